"""The diffusers folder of a Stable Diffusion model, read and written.

model_index.json            what it is, and which class each part is: engine.weights.index
unet/ vae/ text_encoder/    config.json and safetensors: engine.weights.component
tokenizer/                  vocab.json and merges.txt, or tokenizer.json
text_encoder_2/ tokenizer_2/    of SDXL; its refiner has these alone
scheduler/                  scheduler_config.json: the noise schedule and the sampler it was made for
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from engine.diffusion.scheduler_config import SchedulerConfig
from engine.parallel import Devices
from engine.text.tokenizer import Tokenizer, Tokenizers
from engine.types import UserError
from engine.weights import embeddings, index, lora, lycoris
from engine.weights.component import (
    KNOWN,
    MAX_SHARD_SIZE,
    Change,
    Component,
    Place,
    outlined,
    read_config,
    write_component,
)
from engine.weights.files import new_folder, read_json, write_json

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # encoder -> its tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything in a folder."""

    unet: Component
    vae: Component
    text_encoder: Component | None  # None: of the refiner of SDXL
    tokenizer: Tokenizer | None
    scheduler: SchedulerConfig
    text_encoder_2: Component | None = None  # of SDXL
    tokenizer_2: Tokenizer | None = None
    zeros: bool = False  # no negative prompt is zeros, in place of what the encoders say of an empty text
    clip_skip: int = 0  # layers of the text encoders that are left out at their end, where words are read

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained for."""
        size, scale = self.unet.config.sample_size or 64, self.vae.config.scale  # 64, as PyTorch diffusers
        height, width = size if isinstance(size, tuple) else (size, size)
        return height * scale, width * scale

    @property
    def parts(self) -> dict[str, Component]:
        """The networks in it."""
        found = {kind: getattr(self, kind) for kind in index.PARTS}
        return {kind: part for kind, part in found.items() if part is not None}

    @property
    def bare(self) -> "Model":
        """The same without params: what programs are built of, which are given params as arguments."""
        parts = {kind: dataclasses.replace(part, params={}) for kind, part in self.parts.items()}
        return dataclasses.replace(self, **parts)

    @property
    def scored(self) -> bool:
        """Whether it is told how beautiful a picture is, as the refiner of SDXL."""
        if self.text_encoder_2 is None:
            return False
        return index.numbers_beside(self.unet.config, self.text_encoder_2.config, "unet") == index.SCORED

    @property
    def readers(self) -> dict[str, tuple[Component, Tokenizer]]:
        """The text encoders in it, each with its tokenizer."""
        parts = self.parts
        return {
            kind: (parts[kind], getattr(self, name)) for kind, name in TOKENIZERS.items() if kind in parts
        }

    @property
    def tokenizers(self) -> Tokenizer | Tokenizers:
        """What gives ids to all of its text encoders: (B, L), or for two (B, 2, L), as in `readers`."""
        each = tuple(tokenizer for _, tokenizer in self.readers.values())
        return each[0] if len(each) == 1 else Tokenizers(each)

    @property
    def graphdefs(self) -> dict[str, nnx.GraphDef]:
        """Of the networks in it."""
        return {kind: part.graphdef for kind, part in self.parts.items()}

    @property
    def first_tokenizer(self) -> Tokenizer:
        """That of its first text encoder. Two of one model read alike."""
        return next(tokenizer for _, tokenizer in self.readers.values())


class Outline(NamedTuple):
    """What a folder is: all of it but the weights. By the part that it is for, or of."""

    found: index.Index
    scheduler: SchedulerConfig
    tokenizers: dict[str, Tokenizer]  # of each text encoder
    configs: dict[str, Any]


def read_outline(folder: Path) -> Outline:
    """Reads what `load_folder` reads before the weights.

    Raises:
      UserError: no such folder, or anything of that is missing, broken or of a kind that the engine lacks.
    """
    found, scheduler = index.read_index(folder), read_scheduler(folder)
    texts = {kind: TOKENIZERS[kind] for kind in found.kinds if kind in TOKENIZERS}
    tokenizers = {kind: Tokenizer.load(folder / name) for kind, name in texts.items()}
    configs = {kind: read_config(folder / kind / "config.json", kind) for kind in found.kinds}
    _check_classes(configs, found.classes, folder)
    return Outline(found, scheduler, tokenizers, configs)


def load_folder(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    variant: str | None = None,
    place: Place | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    words: Sequence[str | Path] = (),
    clip_skip: int = 0,
    there: Mapping[str, Component] = MappingProxyType({}),
) -> Model:
    """Reads a whole model; `dtype`, `variant`, `place` as in `load_component`.

    Args:
      loras: files (see engine.weights.lora_files, and lycoris) and scales. They are merged in float32, before
        the cast.
      words: files of embeddings (see engine.weights.embeddings), which the model then knows, too.
      clip_skip: see `Model`; no folder says it.
      there: parts that are in memory already, and not read again.

    Raises:
      UserError: no such folder, or anything in it is missing, broken or of a kind that the engine lacks; or
        a LoRA or an embedding that is not for this model, or a text encoder of too few layers.
    """
    folder = Path(os.path.expanduser(path))  # unlike Path's own, silent about users that do not exist
    found, scheduler, tokenizers, configs = read_outline(folder)
    changes, learned = _changes(loras, words, configs, tokenizers)
    check_parts_fit(configs, tokenizers, folder)
    if clip_skip:
        _check_clip_skip(clip_skip, {kind: configs[kind] for kind in tokenizers})
    reader = ThreadPoolExecutor(1, "reading")  # one part after the other, each with threads of its own
    try:
        reading = {
            kind: reader.submit(outlined(folder / kind, kind, dtype, variant, place, changes))
            for kind in configs
            if kind not in there
        }
        parts = {kind: there.get(kind) or reading[kind].result() for kind in configs}
    finally:
        reader.shutdown(wait=False, cancel_futures=True)  # of which none is left, unless something failed
    readers = {name: tokenizers.get(kind) for kind, name in TOKENIZERS.items()}
    whole = dict.fromkeys(index.PARTS) | parts
    model = Model(**whole, **readers, scheduler=scheduler, zeros=found.zeros, clip_skip=clip_skip)
    return functools.reduce(with_words, learned, model)


def _check_clip_skip(clip_skip: int, texts: Mapping[str, Any]) -> None:
    """UserError unless the text encoders of these configs have so many layers to leave out, and one more."""
    least = min(config.num_hidden_layers for config in texts.values())
    most = max(0, least - (2 if "text_encoder_2" in texts else 1))
    if not 0 <= clip_skip <= most:
        raise UserError(f"clip_skip={clip_skip}: of this model's text encoder write 0 to {most}")


def _changes(
    loras: Sequence[tuple[str | Path, float]],
    words: Sequence[str | Path],
    configs: Mapping[str, Any],
    tokenizers: Mapping[str, Tokenizer],
) -> tuple[list[Change], list[embeddings.Words]]:
    """What LoRAs and embeddings make of the parameters, and the words that the embeddings bring."""
    changes: list[Change] = []
    if loras:
        changes.append(lycoris.read_all(loras, {k: c for k, c in configs.items() if k in lora.XL_KINDS}))
    widths = {kind: configs[kind].hidden_size for kind in tokenizers}
    learned = embeddings.read_all(words, tokenizers, widths)
    return changes + [each.change for each in learned], learned


def load_trainable(path: str | Path, clip_skip: int = 0) -> Model:
    """`load_folder` in float32, of arrays on the host: devices are to hold what a step needs, and that once.

    Raises:
      UserError: as there; or a model of a kind that is not trained.
    """
    model = load_folder(path, place=lambda name, array: array, clip_skip=clip_skip)
    unet = model.unet.config
    if index.channels(unet, model.vae.config) != index.WORDS:
        raise UserError(f"{path} draws from a picture beside words, and is not trained: give its base")
    if model.scored:
        raise UserError(f"{path} is a refiner, and is not trained: give its base")
    if unet.time_cond_proj_dim is not None:
        raise UserError(f"{path} was distilled (time_cond_proj_dim), and is not trained: give its base")
    if getattr(model.vae.config, "latents_mean", None) is not None:
        raise UserError(f"{path}: a model whose autoencoder has latents_mean is not trained here")
    return model


def on_devices(model: Model, devices: Devices, dtype: DTypeLike) -> Model:
    """The model with the params of all its parts where `devices` keep them, in another type."""
    parts = {
        kind: dataclasses.replace(part, params=devices.place_tree(part.params, jnp.dtype(dtype)))
        for kind, part in model.parts.items()
    }
    return dataclasses.replace(model, **parts)


def with_words(model: Model, learned: embeddings.Words) -> Model:
    """The model, one of whose tables has the words that were learned, with all that goes by its length."""
    part = learned.resized(model.parts[learned.kind])
    return dataclasses.replace(model, **{learned.kind: part, TOKENIZERS[learned.kind]: learned.tokenizer})


def _check_classes(configs: Mapping[str, Any], classes: Mapping[str, str], folder: Path) -> None:
    """UserError where model_index.json and a part's config.json name two classes."""
    for kind, config in configs.items():
        if classes[kind] != (found := KNOWN[kind].of(config).class_name):
            raise UserError(
                f"{folder / index.FILE}: {kind} is a {classes[kind]}; {kind}/config.json describes a {found}"
            )


def check_parts_fit(configs: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer], where: Path) -> None:
    """UserError where a part of one model stands beside those of another.

    Args:
      configs: of all networks.
      tokenizers: by the text encoder that they are for.
    """
    unet, vae = configs["unet"], configs["vae"]
    texts = {kind: config for kind, config in configs.items() if kind in TOKENIZERS}
    different = f"{where}: the parts are of different models:"
    beside = " + ".join(f"{kind}/config.json hidden_size {text.hidden_size}" for kind, text in texts.items())
    for width in set(unet.per_block("cross_attention_dim")) - {sum(t.hidden_size for t in texts.values())}:
        raise UserError(f"{different} unet/config.json has cross_attention_dim {width}, {beside}")
    if unet.out_channels != vae.latent_channels:
        raise UserError(
            f"{different} unet/config.json has out_channels {unet.out_channels}, vae/config.json "
            f"latent_channels {vae.latent_channels}"
        )
    for kind, tokenizer in tokenizers.items():
        if tokenizer.vocab_size > texts[kind].vocab_size:
            raise UserError(
                f"{different} {TOKENIZERS[kind]}/ has {tokenizer.vocab_size} ids, {kind}/config.json "
                f"vocab_size {texts[kind].vocab_size}"
            )
    if len(lengths := {tokenizer.model_max_length for tokenizer in tokenizers.values()}) > 1:
        raise UserError(
            f"{different} their tokenizers read texts of {' and '.join(map(str, lengths))} tokens"
        )
    if ("text_encoder_2" in texts) != (unet.addition_embed_type is not None):
        raise UserError(
            f"{different} a second text encoder and addition_embed_type in unet/config.json go together, as "
            "in SDXL"
        )
    if "text_encoder_2" in texts:
        index.numbers_beside(unet, texts["text_encoder_2"], f"{different} unet/config.json")


def read_scheduler(folder: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> SchedulerConfig:
    """The scheduler of a model; UserError as of `read_index`, or for what the engine does not know of it.

    changes: options in place of its own.
    """
    found = index.read_index(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    # the index decides on the class, as in diffusers
    options = read_json(file) | {"_class_name": found.classes["scheduler"]}
    if found.offset:  # as diffusers' pipelines of these models have it, whatever the file says
        options |= {"clip_sample": False}
        if SchedulerConfig.from_json(options, str(file)).spacing == "leading":
            options |= {"steps_offset": 1}
    options |= changes
    return SchedulerConfig.from_json(options, str(file))


def save_folder(
    path: str | Path,
    model: Model,
    dtype: DTypeLike | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Writes a model that `load_folder` and PyTorch's `StableDiffusionPipeline.from_pretrained` load.

    The folder appears whole or not at all. `dtype`, `max_shard_size`, `overwrite` as in `save_component`.

    Raises:
      UserError: the folder exists, or a value does not fit into float16.
      OSError: no space left, or the place cannot be written.
    """
    with new_folder(Path(path), index.FILE, overwrite) as new:
        for kind, part in model.parts.items():
            (new / kind).mkdir()
            write_component(new / kind, part, dtype, max_shard_size)
        configs = {kind: part.config for kind, part in model.parts.items()}
        tokenizers = {kind: tokenizer for kind, (_, tokenizer) in model.readers.items()}
        write_rest(new, tokenizers, model.scheduler, configs, model.zeros)


def write_rest(
    folder: Path,
    tokenizers: Mapping[str, Tokenizer],
    scheduler: SchedulerConfig,
    configs: Mapping[str, Any],
    zeros: bool = False,
) -> None:
    """What is no network: the tokenizers, scheduler/ and model_index.json, with the classes of `configs`."""
    for kind, tokenizer in tokenizers.items():
        (folder / TOKENIZERS[kind]).mkdir()
        tokenizer.save(folder / TOKENIZERS[kind])
    options = scheduler.to_json()
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", options)
    index.write_index(folder, configs, options["_class_name"], zeros)
