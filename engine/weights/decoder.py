"""Another autoencoder in place of a model's own: a smaller one, or one that was trained further."""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from engine.models.autoencoder import AutoencoderConfig
from engine.types import UserError
from engine.weights.component import Place, load_component, read_config
from engine.weights.folder import Model
from engine.weights.index import FILE


def with_decoder(
    model: Model, path: str | Path, dtype: DTypeLike = jnp.float32, place: Place | None = None
) -> Model:
    """The model with the autoencoder of another folder; `dtype` and `place` as in `load_component`.

    Args:
      path: a folder with config.json and safetensors, or that of a model, with vae/ in it.

    Raises:
      UserError: there is none, it is broken, or it has other latents than the model.
    """
    folder = find(path)
    theirs, ours = read_config(folder / "config.json", "vae"), model.vae.config
    for name in ("latent_channels", "scale"):
        if getattr(theirs, name) != getattr(ours, name):
            what = "latent_channels" if name == "latent_channels" else "pixels a side to a latent"
            raise UserError(
                f"the decoder {folder} has {getattr(theirs, name)} {what}, the model {getattr(ours, name)}; "
                "give one that was made for this model's latents, or leave it out"
            )
    if isinstance(theirs, AutoencoderConfig) and isinstance(ours, AutoencoderConfig):
        for name in ("scaling_factor", "latents_mean", "latents_std"):
            if getattr(theirs, name) != getattr(ours, name):
                raise UserError(
                    f"the decoder {folder} has {name} {getattr(theirs, name)}, the model {getattr(ours, name)}: "
                    "it was made for the latents of another"
                )
    return dataclasses.replace(model, vae=load_component(folder, "vae", dtype, place=place))


def find(path: str | Path) -> Path:
    """The folder of the autoencoder itself; UserError where there is none."""
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise UserError(f"no decoder {folder}: it is a folder with config.json, or a model's with vae/ in it")
    if (folder / FILE).is_file() or not (folder / "config.json").is_file():
        folder /= "vae"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{path} holds no decoder: looked for config.json, and for vae/config.json as in a model's folder"
        )
    return folder
