"""A second model, which goes the last part of the way to a picture: SDXL's refiner, or another."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from engine.types import UserError
from engine.weights import index
from engine.weights.component import Place, read_config
from engine.weights.folder import Model, load_folder


def load_refiner(
    model: Model, path: str | Path, dtype: DTypeLike = jnp.float32, place: Place | None = None
) -> Model:
    """Reads the refiner of a model, to which the model's own autoencoder belongs; as in `load_folder`.

    Raises:
      UserError: no model there, or one for other latents than the first one's.
    """
    folder = Path(path).expanduser()
    index.read_index(folder)
    theirs, ours = read_config(folder / "vae" / "config.json", "vae"), model.vae.config
    for name, what in (
        ("latent_channels", "latents of {} channels"),
        ("scale", "{} pixels a side to a latent"),
        ("scaling_factor", "latents scaled by {}"),
    ):
        if getattr(theirs, name) != getattr(ours, name):
            told = (what.format(getattr(config, name)) for config in (theirs, ours))
            raise UserError(
                f"{path} is the refiner of another model: it has {next(told)}, the model {next(told)}"
            )
    unet = read_config(folder / "unet" / "config.json", "unet")
    if index.channels(unet, theirs) != index.WORDS:
        raise UserError(
            f"{path} is no refiner: its U-Net takes {unet.in_channels} channels, and there are the "
            f"{theirs.latent_channels} of the latents alone"
        )
    return dataclasses.replace(load_folder(folder, dtype=dtype, place=place), vae=model.vae)
