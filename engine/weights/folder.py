"""The diffusers folder of a Stable Diffusion model, read and written.

    model_index.json            which class each part is
    unet/ vae/ text_encoder/    config.json and safetensors: engine.weights.component
    tokenizer/                  vocab.json and merges.txt, or tokenizer.json
    scheduler/                  scheduler_config.json: the noise schedule and the sampler it was made for

`safety_checker` and `feature_extractor`, which the folders of Stable Diffusion 1 carry, are not read: no
picture depends on them, and a folder without them is complete.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from engine.config import nearest
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.text.tokenizer import Tokenizer
from engine.types import UserError
from engine.weights import embeddings, lora, lora_files
from engine.weights.component import (
    DIFFUSERS_VERSION,
    KINDS,
    MAX_SHARD_SIZE,
    PICKLES,
    Component,
    Place,
    load_component,
    read_config,
    write_component,
)
from engine.weights.files import new_folder, read_json, write_json

PIPELINE = "StableDiffusionPipeline"
INPAINTING, PIX2PIX = "StableDiffusionInpaintPipeline", "StableDiffusionInstructPix2PixPipeline"
PIPELINES = (PIPELINE, "StableDiffusionImg2ImgPipeline", INPAINTING, PIX2PIX)
INDEX = "model_index.json"
NOT_READ = ("safety_checker", "feature_extractor", "requires_safety_checker")


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything in a folder."""

    unet: Component
    vae: Component
    text_encoder: Component
    tokenizer: Tokenizer
    scheduler: SchedulerConfig

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained for."""
        size, scale = self.unet.config.sample_size, self.vae.config.scale
        height, width = size if isinstance(size, tuple) else (size, size)
        return height * scale, width * scale


def pipeline_of(unet: Any, vae: Any) -> str:
    """The class of diffusers that draws with these configs: by the channels that the U-Net takes beside x."""
    latent = vae.latent_channels
    return {latent + 1: INPAINTING, latent: PIX2PIX}.get(unet.in_channels - latent, PIPELINE)


def load_folder(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    variant: str | None = None,
    place: Place | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    words: Sequence[str | Path] = (),
) -> Model:
    """Reads a whole model; `dtype`, `variant`, `place` as in `load_component`.

    Args:
      loras: files (see engine.weights.lora_files) and scales. They are merged in float32, before the cast.
      words: files of embeddings (see engine.weights.embeddings), which the model then knows, too.

    Raises:
      UserError: no such folder, or anything in it is missing, broken or of a kind that the engine lacks; or
        a LoRA or an embedding that is not for this model.
    """
    folder = Path(os.path.expanduser(path))  # unlike Path's own, silent about users that do not exist
    index, scheduler = read_index(folder), read_scheduler(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    configs = {kind: read_config(folder / kind / "config.json", kind) for kind in KINDS}
    _check_classes(configs, index, folder)
    learned = embeddings.read_all(words, tokenizer, configs["text_encoder"].hidden_size)
    drawing = {kind: configs[kind] for kind in lora.KINDS}
    changes = [lora_files.read_all(loras, drawing)] if loras else []
    changes += [learned.change] if learned else []
    parts = {kind: load_component(folder / kind, kind, dtype, variant, place, changes) for kind in KINDS}
    model = Model(**parts, tokenizer=tokenizer, scheduler=scheduler)
    check_parts_fit({kind: part.config for kind, part in parts.items()}, tokenizer, folder)
    return with_words(model, learned) if learned else model


def with_words(model: Model, learned: embeddings.Words) -> Model:
    """The model, whose table of words has those that were learned in it, with all that goes by its length."""
    text_encoder = learned.resized(model.text_encoder)
    return dataclasses.replace(model, text_encoder=text_encoder, tokenizer=learned.tokenizer)


def _check_classes(configs: Mapping[str, Any], index: Mapping[str, str], folder: Path) -> None:
    """UserError where model_index.json and a part's config.json name two classes."""
    for kind, config in configs.items():
        if index[kind] != (found := KINDS[kind].of(config).class_name):
            raise UserError(
                f"{folder / INDEX}: {kind} is a {index[kind]}; {kind}/config.json describes a {found}"
            )


def check_parts_fit(configs: Mapping[str, Any], tokenizer: Tokenizer, where: Path) -> None:
    """UserError where a part of one model stands beside those of another. configs: of each of KINDS."""
    unet, vae, text = (configs[kind] for kind in ("unet", "vae", "text_encoder"))
    if unet.addition_embed_type:
        raise UserError(f"{where}: the U-Net is one of SDXL, whose second text encoder is not read yet")
    for width in set(unet.per_block("cross_attention_dim")) - {text.hidden_size}:
        raise UserError(
            f"{where}: the parts are of different models: unet/config.json has cross_attention_dim {width}, "
            f"text_encoder/config.json hidden_size {text.hidden_size}"
        )
    if unet.out_channels != vae.latent_channels:
        raise UserError(
            f"{where}: the parts are of different models: unet/config.json has out_channels "
            f"{unet.out_channels}, vae/config.json latent_channels {vae.latent_channels}"
        )
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"{where}: the parts are of different models: tokenizer/ has {tokenizer.vocab_size} ids, "
            f"text_encoder/config.json vocab_size {text.vocab_size}"
        )


def read_scheduler(folder: Path) -> SchedulerConfig:
    """The scheduler of a model; UserError as of `read_index`, or for what the engine does not know of it."""
    name = read_index(folder)["scheduler"]
    file = folder / "scheduler" / "scheduler_config.json"
    options = read_json(file) | {"_class_name": name}  # the index decides on the class, as in diffusers
    return SchedulerConfig.from_json(options, str(file))


def read_index(folder: Path) -> dict[str, str]:
    """Part -> class name, from model_index.json; UserError for a part or class that the engine lacks."""
    _check_is_model(folder)
    where = folder / INDEX
    index = read_json(where)
    if (name := index.get("_class_name")) not in PIPELINES:
        raise UserError(f"{where} describes a {name}; the engine reads {', '.join(PIPELINES)}")
    wanted = {kind: spec.class_names for kind, spec in KINDS.items()}
    wanted |= {"tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "scheduler": None}
    found = {}
    for name, value in index.items():
        if name.startswith("_") or name in NOT_READ or value in (None, [None, None]):
            continue
        if name not in wanted:
            raise UserError(f"{where}: unknown part {name!r}{nearest(name, wanted)}")
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)):
            raise UserError(f"{where}: {name} is {value!r}, not [library, class]")
        if wanted[name] is not None and value[1] not in wanted[name]:
            raise UserError(f"{where}: {name} is a {value[1]}; the engine has {' and '.join(wanted[name])}")
        found[name] = value[1]
    if wanted.keys() - found.keys():
        raise UserError(f"{where} names no {', '.join(sorted(wanted.keys() - found.keys()))}")
    return found


def _check_is_model(folder: Path) -> None:
    if folder.is_file():
        check_no_pickle(folder)
        single = folder.suffix == ".safetensors"
        command = f"python -m launch.convert {folder} FOLDER --tokenizer FOLDER"
        hint = f"; make one of a single file with {command}" if single else ""
        raise UserError(
            f"{folder} is a file: a model is a folder with {INDEX}, unet/, vae/, text_encoder/{hint}"
        )
    if not folder.is_dir():
        known_online = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder))
        hint = " (nothing is fetched by name: download it first)" if known_online else ""
        raise UserError(f"no folder {folder}: a model is a folder on this disk, with {INDEX} in it{hint}")
    if not (folder / INDEX).is_file():
        present = ", ".join(sorted(file.name for file in folder.iterdir())[:20]) or "nothing"
        parts = ", ".join(f"{name}/" for name in (*KINDS, "tokenizer", "scheduler"))
        raise UserError(f"{folder} is no model: looked for {INDEX} beside {parts}; it holds {present}")


def check_no_pickle(path: Path) -> None:
    """UserError, with what makes safetensors of it, for a file that can run code when it is opened."""
    if path.name.endswith(PICKLES):
        load = f"torch.load({str(path)!r}, map_location='cpu', weights_only=True)"
        rest = "{k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}"
        raise UserError(
            f"{path} is in a format that is never opened because it can run code; if you trust it, PyTorch "
            f'makes safetensors of it: python -c "import torch, safetensors.torch as s; d = {load}; '
            f"d = d.get('state_dict', d); s.save_file({rest}, {str(path.with_suffix('.safetensors'))!r})\""
        )


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
    with new_folder(Path(path), INDEX, overwrite) as new:
        parts = {kind: getattr(model, kind) for kind in KINDS}
        for kind, part in parts.items():
            (new / kind).mkdir()
            write_component(new / kind, part, dtype, max_shard_size)
        configs = {kind: part.config for kind, part in parts.items()}
        write_rest(new, model.tokenizer, model.scheduler, configs)


def write_rest(
    folder: Path, tokenizer: Tokenizer, scheduler: SchedulerConfig, configs: Mapping[str, Any]
) -> None:
    """What is no network: tokenizer/, scheduler/ and model_index.json, with the classes of `configs`."""
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    options = scheduler.to_json()
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", options)
    index = {
        "_class_name": pipeline_of(configs["unet"], configs["vae"]),
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", options["_class_name"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    classes = {kind: KINDS[kind].of(config) for kind, config in configs.items()}
    parts = {kind: [found.library, found.class_name] for kind, found in classes.items()}
    write_json(folder / INDEX, index | parts)
