"""A text-to-image model from scratch: tokenizer, autoencoder, text encoder, U-Net, decoder, export."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from engine import world
from engine.config import TrainConfig
from engine.diffusion.losses import check_terminal
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.models.autoencoder import AutoencoderConfig
from engine.models.clip import CLIPTextConfig
from engine.models.unet_config import UNetConfig
from engine.text.reading import cut
from engine.text.tokenizer import Tokenizer, train_tokenizer
from engine.train import loop, objectives, optim
from engine.train.checkpoint import whole_steps
from engine.train.data import BatchAt, captions_with_facts
from engine.train.kept import kept_latents
from engine.train.scaling import scaled_once
from engine.train.stage_data import SEEDS, StageData, stage_data
from engine.train.step import Loss, cast
from engine.train.workdir import check_same_pictures, check_same_run, remember
from engine.types import Params, UserError
from engine.weights.component import Component, abstract
from engine.weights.files import new_folder
from engine.weights.folder import Model, load_trainable, save_folder
from engine.weights.kinds import KINDS

Fit = Callable[..., Params | None]  # see loop.fit
Parts = dict[str, Component]  # "vae", "text_encoder", "unet"

# Settings that a run keeps to its end.
SETTLED = (
    "seed",
    "image_size",
    "vocab_size",
    "max_tokens",
    "start",
    "scheduler",
    "vae",
    "unet",
    "text_encoder",
)

CAPTIONS_FOR_TOKENIZER = 20_000
LATENT_IMAGES = 512
SCALE = "scale.safetensors"  # in the autoencoder's folder: see `scaled_once`


class Run(NamedTuple):
    """What all stages of a run have in common."""

    config: TrainConfig
    tokenizer: Tokenizer
    data: StageData
    workdir: pathlib.Path
    fit: Fit


def train(config: TrainConfig, workdir: pathlib.Path, fit: Fit = loop.fit) -> pathlib.Path | None:
    """Trains what is not yet trained in `workdir` and exports it.

    Where several processes have met (`engine.parallel.meet`), they train together, each with its rows of the
    batches; `workdir` is the same folder for all, and the first writes there.

    Args:
      fit: what is done with a stage; `dry_run.fit` looks at it only.

    Returns:
      The folder of the model; None when a signal stopped the run, and on all hosts but the first.

    Raises:
      UserError: the config is wrong, or `workdir` holds the run of a model of another shape.
    """
    model = build(config, workdir, fit)
    if model is None or fit is not loop.fit or jax.process_index():
        return None
    return export(model, workdir / "model")


def build(config: TrainConfig, workdir: pathlib.Path, fit: Fit) -> Model | None:
    """The model that the stages make, one after the other; None where `fit` made None of one."""
    config.validate()
    check_terminal(
        _scheduler(config), config.diffusion
    )  # a mistake in it is told now, not when its stage begins
    part_configs(config, config.vocab_size)  # nor is one in them when all pictures were looked at
    check_same_run(config, workdir, SETTLED)
    check_same_pictures(config, workdir)
    data = stage_data(config, workdir, jax.process_index(), jax.process_count())
    if config.start:
        tokenizer, parts = started(config)
    else:
        tokenizer = _tokenizer(config, workdir, data)
        parts = components(config, tokenizer)
    _remember(config, tokenizer, workdir)

    _check_order(config, workdir)
    run = Run(config, tokenizer, data, workdir, fit)
    for train_parts in (train_autoencoder, train_words, train_diffusion, train_decoder):
        trained = train_parts(run, parts)
        if trained is None:
            return None
        parts |= trained
    return Model(**parts, tokenizer=tokenizer, scheduler=_scheduler(config))


def _check_order(config: TrainConfig, workdir: pathlib.Path) -> None:
    """UserError where a stage would go on that a later one has learned from: its latents, or its words."""
    for name, later in (("autoencoder", ("diffusion", "decoder")), ("words", ("diffusion",))):
        done, wanted = max(whole_steps(workdir / name), default=0), getattr(config, name).steps
        learned = [each for each in later if whole_steps(workdir / each)]
        if done < wanted and learned:
            raise UserError(
                f"{name}.steps={wanted}: {workdir} has {done} of them, and its {learned[0]} has learned from "
                f"what they made: write {name}.steps={done}, or --config.start={workdir}/model and another "
                "--workdir"
            )


def train_autoencoder(run: Run, parts: Parts) -> Parts | None:
    """The autoencoder, its latents brought to a scale that suits the diffusion."""
    stage, vae = run.config.autoencoder, parts["vae"]
    if stage.steps == 0:
        return {}
    loss = objectives.autoencoder_loss(vae.graphdef, stage)
    params = _fit(run, "autoencoder", loss, vae.params, {}, run.data.pictures("autoencoder"))
    if params is None:
        return None
    kept = run.workdir / "autoencoder" / SCALE
    scaled = scaled_once(vae, params, lambda: run.data.images(LATENT_IMAGES), kept)
    return {"vae": dataclasses.replace(vae, params=scaled)}


def train_decoder(run: Run, parts: Parts) -> Parts | None:
    """The autoencoder with a decoder trained further. The encoder stays: the U-Net knows its latents."""
    stage, vae = run.config.decoder, parts["vae"]
    if stage.steps == 0:
        return {}
    decoding = {name: vae.params[name] for name in ("decoder", "post_quant_conv")}
    rest = {name: part for name, part in vae.params.items() if name not in decoding}
    loss = objectives.autoencoder_loss(vae.graphdef, stage)
    params = _fit(run, "decoder", loss, decoding, rest, run.data.pictures("decoder"))
    return None if params is None else {"vae": dataclasses.replace(vae, params={**vae.params, **params})}


def train_words(run: Run, parts: Parts) -> Parts | None:
    """The text encoder, so that its vectors say what a scene shows, whatever the words and their order.

    A U-Net that learned its words together with its pictures learned the backgrounds alone: a thing's name
    is one word in ten and moves few pixels, and its trace was lost in the noise of the steps.
    """
    stage, encoder = run.config.words, parts["text_encoder"]
    if stage.steps == 0:
        return {}
    fresh = {
        "text_encoder": encoder.params,
        "heads": objectives.fresh_heads(encoder.config.hidden_size, world.FACTS),
    }
    hosts = jax.process_index(), jax.process_count()
    seed = run.config.seed + SEEDS["words"]
    batch_at = captions_with_facts(seed, stage.batch_size, run.tokenizer, *hosts)
    loss = objectives.words_loss(encoder.graphdef, world.FACTS)
    params = _fit(run, "words", loss, fresh, {}, batch_at)
    return None if params is None else _with(parts, {"text_encoder": params["text_encoder"]})


def train_diffusion(run: Run, parts: Parts) -> Parts | None:
    """The U-Net, averaged over its last steps; with the text encoder, where the stage says so."""
    stage = run.config.diffusion
    if stage.steps == 0:
        return {}
    graphdefs = {kind: part.graphdef for kind, part in parts.items()}
    loss = objectives.text_to_image_loss(graphdefs, _scheduler(run.config), stage)
    frozen = {"vae": parts["vae"].params, "empty_ids": run.tokenizer.encode([""])[0]}
    batch_at = _captioned(run, parts["vae"])
    if stage.train_text_encoder:
        both = {kind: parts[kind].params for kind in ("unet", "text_encoder")}
        params = _fit(run, "diffusion", objectives.over_parts(loss), both, frozen, batch_at)
        return None if params is None else _with(parts, params)
    frozen["text_encoder"] = parts["text_encoder"].params
    params = _fit(run, "diffusion", loss, parts["unet"].params, frozen, batch_at)
    return None if params is None else _with(parts, {"unet": params})


def _captioned(run: Run, vae: Component) -> BatchAt:
    """The batches of the stage of diffusion."""
    config = run.config
    if not config.diffusion.distinct:
        return run.data.captioned(run.tokenizer)
    seed, folder = config.seed + SEEDS["diffusion"], run.workdir / "latents"
    hosts = jax.process_index(), jax.process_count()
    return kept_latents(config, seed, run.tokenizer, vae, folder, *hosts)


def _fit(
    run: Run, name: str, loss: Loss, params: Params, frozen: dict[str, Any], batch_at: BatchAt
) -> Params | None:
    stage = getattr(run.config, name)
    return run.fit(
        name,
        loss,
        params,
        cast(frozen, stage.compute_dtype),
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=run.config.seed + SEEDS[name],
        batch_at=batch_at,
        workdir=run.workdir,
    )


def _with(parts: Parts, trained: dict[str, Params]) -> Parts:
    """The parts that were trained, with their params."""
    return {kind: dataclasses.replace(parts[kind], params=params) for kind, params in trained.items()}


def export(model: Model, folder: pathlib.Path, overwrite: bool = True) -> pathlib.Path:
    """Writes the model in the diffusers layout, in float16."""
    save_folder(folder, model, dtype=jnp.float16, overwrite=overwrite)
    return folder


def _scheduler(config: TrainConfig) -> SchedulerConfig:
    return SchedulerConfig.from_json(config.scheduler, "config.scheduler")


def _tokenizer(config: TrainConfig, workdir: pathlib.Path, data: StageData) -> Tokenizer:
    if (workdir / "tokenizer").exists():
        return Tokenizer.load(workdir / "tokenizer")
    captions, words = data.texts(CAPTIONS_FOR_TOKENIZER)
    tokenizer = train_tokenizer(captions, config.vocab_size, config.max_tokens, words)
    if config.data.paths and jax.process_index() == 0:
        longer = sum(cut(caption, tokenizer) is not None for caption in captions)
        told = f"{tokenizer.vocab_size} ids from {len(captions)} captions"
        print(f"tokenizer: {told}; {longer} are cut at max_tokens={config.max_tokens}", flush=True)
    return tokenizer


def components(config: TrainConfig, tokenizer: Tokenizer) -> Parts:
    """The three networks with fresh weights; UserError as in `part_configs`."""
    configs = part_configs(config, tokenizer.vocab_size)
    return {kind: _fresh(kind, each, config.seed) for kind, each in configs.items()}


def started(config: TrainConfig) -> tuple[Tokenizer, Parts]:
    """The tokenizer and the three networks of the folder config.start.

    Raises:
      UserError: the folder cannot be read, or holds a model of another shape than the config's.
    """
    model = load_trainable(config.start)
    parts = {kind: getattr(model, kind) for kind in KINDS}
    for kind, wanted in part_configs(config, model.tokenizer.vocab_size).items():
        here = dataclasses.asdict(parts[kind].config)
        for name, value in dataclasses.asdict(wanted).items():
            if here[name] != value and name != "sample_size":  # no weight depends on it
                raise UserError(
                    f"start={config.start}: its {kind} has {name}={here[name]!r}, the config {value!r}: "
                    "give a model of the same shape"
                )
        graphdef, _ = abstract(kind, wanted)
        parts[kind] = dataclasses.replace(parts[kind], config=wanted, graphdef=graphdef)
    return model.tokenizer, parts


def part_configs(config: TrainConfig, vocab_size: int) -> dict[str, Any]:
    """The configs of the three networks; what one part must know of another is filled in.

    Raises:
      UserError: an option of theirs is wrong, or they do not fit together.
    """
    vae = AutoencoderConfig.from_json({"sample_size": config.image_size, **config.vae}, "config.vae")
    if config.autoencoder.steps:  # its latents are brought to unit variance by these convolutions
        if vae.scaling_factor != 1:
            raise UserError(
                f"vae.scaling_factor={vae.scaling_factor}: write 1.0, as training scales the latents"
            )
        if not (vae.use_quant_conv and vae.use_post_quant_conv):
            raise UserError("vae.use_quant_conv and use_post_quant_conv: write True to train an autoencoder")
    if config.image_size < vae.scale or config.image_size % vae.scale:
        raise UserError(f"image_size={config.image_size}: this autoencoder takes multiples of {vae.scale}")
    if config.data.buckets > 1 and config.data.multiple % vae.scale:
        raise UserError(
            f"data.multiple={config.data.multiple}: this autoencoder takes multiples of {vae.scale}"
        )
    text = CLIPTextConfig.from_json(
        {
            **config.text_encoder,
            "vocab_size": vocab_size,
            "max_position_embeddings": config.max_tokens,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        "config.text_encoder",
    )
    unet = UNetConfig.from_json(
        {
            **config.unet,
            "sample_size": config.image_size // vae.scale,
            "in_channels": vae.latent_channels,
            "out_channels": vae.latent_channels,
            "cross_attention_dim": text.hidden_size,
        },
        "config.unet",
    )
    return {"vae": vae, "unet": unet, "text_encoder": text}


def _fresh(kind: str, config: Any, seed: int) -> Component:
    graphdef, params = nnx.split(KINDS[kind].module(config, nnx.Rngs(seed)), nnx.Param)
    return Component(kind, config, graphdef, nnx.to_pure_dict(params))


def _remember(config: TrainConfig, tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
    """Keeps what the run began with beside it, now that it is known to be sound; the first host does."""
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
        return
    if not (workdir / "tokenizer").exists():
        with new_folder(workdir / "tokenizer", "vocab.json", overwrite=False) as new:
            tokenizer.save(new)
    remember(config, workdir)
