"""A text-to-image model from scratch: tokenizer, autoencoder, U-Net with text encoder, decoder, export."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine import scenes
from engine.config import TrainConfig
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.diffusion.schedules import schedule_for
from engine.models.autoencoder import AutoencoderConfig
from engine.models.clip import CLIPTextConfig
from engine.models.unet import UNetConfig
from engine.text.tokenizer import Tokenizer, train_tokenizer
from engine.train import loop, objectives, optim
from engine.train.data import scene_batch
from engine.types import Params, UserError
from engine.weights.component import KINDS, Component
from engine.weights.files import new_folder, read_json, write_json
from engine.weights.folder import Model, save_folder

CAPTIONS_FOR_TOKENIZER = 20_000
WHITENING_IMAGES = 512
WHITENING_SEED = 2**31  # not the training's seeds: scenes of their own


def train(config: TrainConfig, workdir: pathlib.Path) -> pathlib.Path | None:
    """Trains what is not yet trained in `workdir` and exports it.

    Returns:
      The folder of the model, or None when a signal stopped the run.

    Raises:
      UserError: the config is wrong, or `workdir` holds the run of a model of another shape.
    """
    config.validate()
    _scheduler(config)  # a mistake in it is told now, not when its stage begins
    _check_same_run(config, workdir)
    tokenizer = _tokenizer(config, workdir)
    parts = components(config, tokenizer)
    _remember(config, tokenizer, workdir)

    vae = train_autoencoder(config, parts["vae"], workdir)
    if vae is None:
        return None
    parts["vae"] = vae
    trained = train_diffusion(config, parts, tokenizer, workdir)
    if trained is None:
        return None
    sharper = train_decoder(config, parts["vae"], workdir)
    if sharper is None:
        return None
    return export(config, parts | {"vae": sharper}, trained, tokenizer, workdir)


def train_autoencoder(config: TrainConfig, vae: Component, workdir: pathlib.Path) -> Component | None:
    """The autoencoder, its latents brought to zero mean and unit variance."""
    stage = config.autoencoder
    params = loop.fit(
        "autoencoder",
        objectives.autoencoder_loss(vae.graphdef, stage),
        vae.params,
        {},
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=config.seed,
        data={"seed": config.seed, "size": config.image_size},
        workdir=workdir,
    )
    if params is None:
        return None
    images = scene_batch(WHITENING_SEED, 0, WHITENING_IMAGES, config.image_size, None)["image"]
    return dataclasses.replace(vae, params=whiten(vae, params, images))


def train_decoder(config: TrainConfig, vae: Component, workdir: pathlib.Path) -> Component | None:
    """The autoencoder with a decoder trained further. The encoder stays: the U-Net knows its latents."""
    stage = config.decoder
    if stage.steps == 0:
        return vae
    decoding = {name: vae.params[name] for name in ("decoder", "post_quant_conv")}
    params = loop.fit(
        "decoder",
        objectives.autoencoder_loss(vae.graphdef, stage),
        decoding,
        {name: part for name, part in vae.params.items() if name not in decoding},
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=config.seed + 2,
        data={"seed": config.seed + 2, "size": config.image_size},
        workdir=workdir,
    )
    return None if params is None else dataclasses.replace(vae, params={**vae.params, **params})


def whiten(vae: Component, params: Params, images: np.ndarray) -> Params:
    """The same autoencoder with latents of zero mean and unit variance in every channel.

    The affine map goes into the 1x1 convolutions on both sides of the latent: z' = (z - mean) / std
    into quant_conv, whose other half, the log variance, falls by 2 log std; its inverse into
    post_quant_conv. The diffusion then starts from well-scaled data, and scaling_factor is 1.
    """

    @jax.jit
    def encode(batch):
        return objectives.applier(vae.graphdef)(params).encode(objectives.to_float(batch)).mean

    z = np.concatenate([np.asarray(encode(images[i : i + 32])) for i in range(0, len(images), 32)])
    mean, std = z.mean((0, 1, 2)), z.std((0, 1, 2))
    quant, post = params["quant_conv"], params["post_quant_conv"]
    ones = np.ones_like(std)
    scale = np.concatenate([1 / std, ones])
    shift = np.concatenate([-mean / std, -2 * np.log(std)])
    return {
        **params,
        "quant_conv": {"kernel": quant["kernel"] * scale, "bias": quant["bias"] * scale + shift},
        "post_quant_conv": {
            "kernel": post["kernel"] * std[:, None],
            "bias": post["bias"] + jnp.einsum("hwio,i->o", post["kernel"], mean),
        },
    }


def train_diffusion(
    config: TrainConfig, parts: dict[str, Component], tokenizer: Tokenizer, workdir: pathlib.Path
) -> Params | None:
    """{"unet": params, "text_encoder": params}, averaged."""
    stage, scheduler = config.diffusion, _scheduler(config)
    loss = objectives.text_to_image_loss(
        parts["unet"].graphdef,
        parts["text_encoder"].graphdef,
        parts["vae"].graphdef,
        schedule_for(scheduler),
        scheduler.prediction_type,
        stage,
    )
    return loop.fit(
        "diffusion",
        loss,
        {kind: parts[kind].params for kind in ("unet", "text_encoder")},
        {"vae": parts["vae"].params, "empty_ids": tokenizer.encode([""])[0]},
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=config.seed + 1,
        data={"seed": config.seed + 1, "size": config.image_size, "tokenizer": tokenizer},
        workdir=workdir,
    )


def export(
    config: TrainConfig,
    parts: dict[str, Component],
    trained: Params,
    tokenizer: Tokenizer,
    workdir: pathlib.Path,
) -> pathlib.Path:
    """Writes workdir/model in the diffusers layout, in float16."""
    for kind, params in trained.items():
        parts[kind] = dataclasses.replace(parts[kind], params=params)
    folder = workdir / "model"
    model = Model(**parts, tokenizer=tokenizer, scheduler=_scheduler(config))
    save_folder(folder, model, dtype=jnp.float16, overwrite=True)
    return folder


def _scheduler(config: TrainConfig) -> SchedulerConfig:
    return SchedulerConfig.from_json(config.scheduler, "config.scheduler")


def _tokenizer(config: TrainConfig, workdir: pathlib.Path) -> Tokenizer:
    if (workdir / "tokenizer").exists():
        return Tokenizer.load(workdir / "tokenizer")
    captions = scenes.all_captions(CAPTIONS_FOR_TOKENIZER)
    return train_tokenizer(captions, config.vocab_size, config.max_tokens, sorted(scenes.words()))


def components(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Component]:
    """The three networks with fresh weights; what one part must know of another is filled in.

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
    configs: dict[str, Any] = {"vae": vae, "unet": unet, "text_encoder": text}
    return {kind: _fresh(kind, configs[kind], config.seed) for kind in configs}


def _fresh(kind: str, config: Any, seed: int) -> Component:
    graphdef, params = nnx.split(KINDS[kind].module(config, nnx.Rngs(seed)), nnx.Param)
    return Component(kind, config, graphdef, nnx.to_pure_dict(params))


def _check_same_run(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Refuses to go on with a model of another shape."""
    file = workdir / "config.json"
    if not file.exists():
        return
    before, now = read_json(file), json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    for name in ("seed", "image_size", "vocab_size", "max_tokens", "vae", "unet", "text_encoder"):
        if before.get(name) != now[name]:
            raise UserError(
                f"{workdir} holds a run with {name}={before.get(name)!r}, not {now[name]!r}: "
                "give another --workdir, or the config that it began with"
            )


def _remember(config: TrainConfig, tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
    """Keeps what the run began with beside it, now that it is known to be sound."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "tokenizer").exists():
        with new_folder(workdir / "tokenizer", "vocab.json", overwrite=False) as new:
            tokenizer.save(new)
    unfinished = workdir / ".config.json"
    write_json(unfinished, dataclasses.asdict(config))
    unfinished.replace(workdir / "config.json")
