"""A text-to-image model from scratch: tokenizer, autoencoder, text encoder, U-Net, decoder, export."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from engine import scenes
from engine.config import TrainConfig
from engine.diffusion.losses import check_terminal
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.models.autoencoder import AutoencoderConfig
from engine.models.clip import CLIPTextConfig
from engine.models.unet import UNetConfig
from engine.text.tokenizer import Tokenizer, train_tokenizer
from engine.train import loop, objectives, optim
from engine.train.data import captioned_pictures, captions_with_facts, pictures
from engine.train.workdir import check_same_run, remember
from engine.types import Params, UserError
from engine.weights.component import KINDS, Component
from engine.weights.files import new_folder
from engine.weights.folder import Model, load_folder, save_folder

Fit = Callable[..., Params | None]  # see loop.fit

# Settings that a run keeps to its end.
SETTLED = ("seed", "image_size", "vocab_size", "max_tokens", "start", "vae", "unet", "text_encoder")

CAPTIONS_FOR_TOKENIZER = 20_000
METRIC_IMAGES = 32
LATENT_IMAGES = 512
LATENT_SEED = 2**31  # not the training's seeds: scenes of their own


def train(config: TrainConfig, workdir: pathlib.Path, fit: Fit = loop.fit) -> pathlib.Path | None:
    """Trains what is not yet trained in `workdir` and exports it.

    Args:
      fit: what is done with a stage; `dry_run.fit` looks at it only.

    Returns:
      The folder of the model, or None when a signal stopped the run.

    Raises:
      UserError: the config is wrong, or `workdir` holds the run of a model of another shape.
    """
    model = build(config, workdir, fit)
    return None if model is None or fit is not loop.fit else export(model, workdir / "model")


def build(config: TrainConfig, workdir: pathlib.Path, fit: Fit) -> Model | None:
    """The model that the stages make, one after the other; None where `fit` made None of one."""
    config.validate()
    check_terminal(_scheduler(config))  # a mistake in it is told now, not when its stage begins
    check_same_run(config, workdir, SETTLED)
    if config.start:
        tokenizer, parts = started(config)
    else:
        tokenizer = _tokenizer(config, workdir)
        parts = components(config, tokenizer)
    _remember(config, tokenizer, workdir)

    stages = (
        ("vae", lambda: train_autoencoder(config, parts["vae"], workdir, fit)),
        ("text_encoder", lambda: train_words(config, parts["text_encoder"], tokenizer, workdir, fit)),
        ("unet", lambda: train_diffusion(config, parts, tokenizer, workdir, fit)),
        ("vae", lambda: train_decoder(config, parts["vae"], workdir, fit)),
    )
    for kind, train_part in stages:
        trained = train_part()
        if trained is None:
            return None
        parts[kind] = trained
    return Model(**parts, tokenizer=tokenizer, scheduler=_scheduler(config))


def train_autoencoder(
    config: TrainConfig, vae: Component, workdir: pathlib.Path, fit: Fit = loop.fit
) -> Component | None:
    """The autoencoder, its latents brought to a scale that suits the diffusion."""
    stage = config.autoencoder
    if stage.steps == 0:
        return vae
    params = fit(
        "autoencoder",
        objectives.autoencoder_loss(vae.graphdef, stage),
        vae.params,
        {},
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=config.seed,
        batch_at=pictures(config.seed, stage.batch_size, config.image_size),
        workdir=workdir,
    )
    if params is None:
        return None
    images = pictures(LATENT_SEED, LATENT_IMAGES, config.image_size)(0)["image"]
    return dataclasses.replace(vae, params=in_units_of_pixels(vae, params, images))


def train_decoder(
    config: TrainConfig, vae: Component, workdir: pathlib.Path, fit: Fit = loop.fit
) -> Component | None:
    """The autoencoder with a decoder trained further. The encoder stays: the U-Net knows its latents."""
    stage = config.decoder
    if stage.steps == 0:
        return vae
    decoding = {name: vae.params[name] for name in ("decoder", "post_quant_conv")}
    params = fit(
        "decoder",
        objectives.autoencoder_loss(vae.graphdef, stage),
        decoding,
        {name: part for name, part in vae.params.items() if name not in decoding},
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=config.seed + 2,
        batch_at=pictures(config.seed + 2, stage.batch_size, config.image_size),
        workdir=workdir,
    )
    return None if params is None else dataclasses.replace(vae, params={**vae.params, **params})


def in_units_of_pixels(vae: Component, params: Params, images: np.ndarray) -> Params:
    """The same autoencoder with latents in which an error weighs what it costs in the picture.

    z' = (z - mean) G^(1/2) R / s, where G = E[J^T J] with the decoder's Jacobian J, R turns to the principal
    axes, and s makes the variance 1 on average over the channels. So the channels of colour are large and
    those of fine texture small, and the noise of diffusion leaves the coarse for last, as it does with
    pixels; latents of equal variance would spend most of the U-Net on texture. The map goes into the 1x1
    convolutions on both sides of the latent; the posterior's variance becomes its mean, a constant.
    """
    z, variance = _posterior(vae, params, images)
    mean, C = z.mean((0, 1, 2)), z.shape[-1]
    root = _root(pixel_metric(vae.graphdef, params, z[:METRIC_IMAGES]))
    scaled = (z - mean).reshape(-1, C) @ root
    values, axes = np.linalg.eigh(scaled.T @ scaled / len(scaled))
    to = root @ axes[:, ::-1] / np.sqrt(values.mean())
    quant, post = params["quant_conv"], params["post_quant_conv"]
    noise = np.log(np.einsum("ij,i->j", to**2, variance).mean())
    return {
        **params,
        "quant_conv": {
            "kernel": np.concatenate(
                [quant["kernel"][..., :C] @ to, np.zeros_like(quant["kernel"][..., C:])], -1
            ),
            "bias": np.concatenate([(quant["bias"][:C] - mean) @ to, np.full(C, noise, np.float32)]),
        },
        "post_quant_conv": {
            "kernel": np.linalg.inv(to) @ post["kernel"],
            "bias": post["bias"] + mean @ post["kernel"][0, 0],
        },
    }


def _posterior(vae: Component, params: Params, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The latents' means (N, h, w, C) and the mean variance of each channel (C,)."""

    @jax.jit
    def encode(batch):
        posterior = objectives.applier(vae.graphdef)(params).encode(objectives.to_float(batch))
        return posterior.mean, jnp.exp(posterior.logvar).mean((0, 1, 2))

    means, variances = zip(*(encode(images[i : i + 32]) for i in range(0, len(images), 32)), strict=True)
    return np.concatenate(means), np.mean(variances, 0)


@functools.partial(jax.jit, static_argnums=0)
def pixel_metric(graphdef: nnx.GraphDef, params: Params, z: Array) -> Array:
    """E[J^T J] (C, C): what a step in latent space costs, in squares of pixels, channel against channel."""
    decode = objectives.applier(graphdef)(params).decode
    # Random signs over the places make the places' cross terms vanish (Hutchinson 1989).
    signs = jax.random.rademacher(jax.random.key(0), (*z.shape[:-1], 1), z.dtype)
    pushed = [jax.jvp(decode, (z,), (signs * direction,))[1] for direction in jnp.eye(z.shape[-1])]
    flat = jnp.stack(pushed).reshape(z.shape[-1], -1)
    return flat @ flat.T / (z.size // z.shape[-1])


def _root(matrix: Array) -> np.ndarray:
    """The symmetric square root of a positive matrix."""
    values, axes = np.linalg.eigh(np.asarray(matrix))
    return axes * np.sqrt(np.maximum(values, values.max() * 1e-6)) @ axes.T


def train_words(
    config: TrainConfig,
    text_encoder: Component,
    tokenizer: Tokenizer,
    workdir: pathlib.Path,
    fit: Fit = loop.fit,
) -> Component | None:
    """The text encoder, so that its vectors say what a scene shows, whatever the words and their order.

    A U-Net that learned its words together with its pictures learned the backgrounds alone: a thing's name
    is one word in ten and moves few pixels, and its trace was lost in the noise of the steps.
    """
    stage = config.words
    if stage.steps == 0:
        return text_encoder
    params = fit(
        "words",
        objectives.words_loss(text_encoder.graphdef),
        {
            "text_encoder": text_encoder.params,
            "heads": objectives.fresh_heads(text_encoder.config.hidden_size),
        },
        {},
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=config.seed + 3,
        batch_at=captions_with_facts(config.seed + 3, stage.batch_size, tokenizer),
        workdir=workdir,
    )
    return None if params is None else dataclasses.replace(text_encoder, params=params["text_encoder"])


def train_diffusion(
    config: TrainConfig,
    parts: dict[str, Component],
    tokenizer: Tokenizer,
    workdir: pathlib.Path,
    fit: Fit = loop.fit,
) -> Component | None:
    """The U-Net, averaged over its last steps."""
    stage = config.diffusion
    if stage.steps == 0:
        return parts["unet"]
    loss = objectives.text_to_image_loss(
        parts["unet"].graphdef,
        parts["text_encoder"].graphdef,
        parts["vae"].graphdef,
        _scheduler(config),
        stage,
    )
    params = fit(
        "diffusion",
        loss,
        parts["unet"].params,
        {
            "vae": parts["vae"].params,
            "text_encoder": parts["text_encoder"].params,
            "empty_ids": tokenizer.encode([""])[0],
        },
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=config.seed + 1,
        batch_at=captioned_pictures(
            config.seed + 1,
            stage.batch_size,
            config.image_size,
            tokenizer,
            stage.easy,
            stage.easy_steps,
            keep_tags=stage.keep_tags if stage.caption_shuffle else None,
        ),
        workdir=workdir,
    )
    return None if params is None else dataclasses.replace(parts["unet"], params=params)


def export(model: Model, folder: pathlib.Path, overwrite: bool = True) -> pathlib.Path:
    """Writes the model in the diffusers layout, in float16."""
    save_folder(folder, model, dtype=jnp.float16, overwrite=overwrite)
    return folder


def _scheduler(config: TrainConfig) -> SchedulerConfig:
    return SchedulerConfig.from_json(config.scheduler, "config.scheduler")


def _tokenizer(config: TrainConfig, workdir: pathlib.Path) -> Tokenizer:
    if (workdir / "tokenizer").exists():
        return Tokenizer.load(workdir / "tokenizer")
    captions, _ = scenes.told(0, 0, CAPTIONS_FOR_TOKENIZER)
    return train_tokenizer(captions, config.vocab_size, config.max_tokens, sorted(scenes.words()))


def components(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Component]:
    """The three networks with fresh weights; UserError as in `part_configs`."""
    return {kind: _fresh(kind, each, config.seed) for kind, each in part_configs(config, tokenizer).items()}


def started(config: TrainConfig) -> tuple[Tokenizer, dict[str, Component]]:
    """The tokenizer and the three networks of the folder config.start.

    Raises:
      UserError: the folder cannot be read, or holds a model of another shape than the config's.
    """
    model = load_folder(config.start)
    parts = {kind: getattr(model, kind) for kind in KINDS}
    for kind, wanted in part_configs(config, model.tokenizer).items():
        here = dataclasses.asdict(parts[kind].config)
        for name, value in dataclasses.asdict(wanted).items():
            if here[name] != value:
                raise UserError(
                    f"start={config.start}: its {kind} has {name}={here[name]!r}, the config {value!r}: "
                    "give a model of the same shape"
                )
    return model.tokenizer, parts


def part_configs(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The configs of the three networks; what one part must know of another is filled in.

    Raises:
      UserError: an option of theirs is wrong, or they do not fit together.
    """
    vae = AutoencoderConfig.from_json({"sample_size": config.image_size, **config.vae}, "config.vae")
    if config.image_size < vae.scale or config.image_size % vae.scale:
        raise UserError(f"image_size={config.image_size}: this autoencoder takes multiples of {vae.scale}")
    text = CLIPTextConfig.from_json(
        {
            **config.text_encoder,
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": config.max_tokens,
            "bos_token_id": tokenizer.vocab_size - 2,
            "eos_token_id": tokenizer.vocab_size - 1,
            "pad_token_id": tokenizer.vocab_size - 1,
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
    """Keeps what the run began with beside it, now that it is known to be sound."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "tokenizer").exists():
        with new_folder(workdir / "tokenizer", "vocab.json", overwrite=False) as new:
            tokenizer.save(new)
    remember(config, workdir)
