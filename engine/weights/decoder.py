"""Another autoencoder in place of a model's own: a smaller one, or one that was trained further."""

import dataclasses
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from engine.models.autoencoder import AutoencoderConfig
from engine.types import UserError
from engine.weights import names
from engine.weights.component import (
    Component,
    Place,
    abstract,
    as_dtype,
    load_component,
    match,
    read_config,
    read_params,
)
from engine.weights.folder import Model
from engine.weights.index import FILE, check_no_pickle
from engine.weights.original_names import VAE, slots
from engine.weights.safetensors_io import Tensor, read_header

# Of the training of an autoencoder, in files beside it.
NOT_OF_IT = re.compile(r"(loss|model_ema)\.")


def with_decoder(
    model: Model, path: str | Path, dtype: DTypeLike = jnp.float32, place: Place | None = None
) -> Model:
    """The model with the autoencoder of another folder; `dtype` and `place` as in `load_component`.

    Args:
      path: a folder with config.json and safetensors, or that of a model, with vae/ in it; or a file with an
        autoencoder built as the model's, in the original layout or that of diffusers.

    Raises:
      UserError: there is none, it is broken, or it has other latents than the model.
    """
    found = find(path)
    if found.is_file():
        return dataclasses.replace(model, vae=_from_file(model, found, as_dtype(dtype), place))
    _check_fits(model, found)
    return dataclasses.replace(model, vae=load_component(found, "vae", dtype, place=place))


def _check_fits(model: Model, folder: Path) -> None:
    theirs, ours = read_config(folder / "config.json", "vae"), model.vae.config
    for name in ("latent_channels", "scale"):
        if getattr(theirs, name) != getattr(ours, name):
            what = "latent_channels" if name == "latent_channels" else "pixels a side to a latent"
            raise UserError(
                f"the decoder {folder} has {getattr(theirs, name)} {what}, the model {getattr(ours, name)}; "
                "give one that was made for this model's latents, or leave it out"
            )
    if not isinstance(theirs, AutoencoderConfig) or not isinstance(ours, AutoencoderConfig):
        return
    for name in ("scaling_factor", "latents_mean", "latents_std"):
        if (value := getattr(theirs, name)) != (own := getattr(ours, name)):
            raise UserError(
                f"the decoder {folder} has {name} {value}, the model {own}: it was made for other latents"
            )


def _from_file(model: Model, file: Path, dtype: np.dtype, place: Place | None) -> Component:
    """One that has no config: the model's own."""
    config, header = model.vae.config, read_header(file)
    if not isinstance(config, AutoencoderConfig):
        raise UserError(f"{file} has no config, and the model's own decoder is another kind: give a folder")
    prefix = VAE if any(key.startswith(VAE) for key in header) else ""
    header = {
        key: tensor
        for key, tensor in header.items()
        if key.startswith(prefix) and not NOT_OF_IT.match(key.removeprefix(prefix))
    }
    graphdef, shapes = abstract("vae", config)
    places = slots("vae", config, names.keys(shapes), prefix)
    ours = {slot.key: (key, len(slot.tail)) for key, slot in places.items()}

    def renamed(key: str, tensor: Tensor) -> tuple[str, Tensor]:
        name, tail = ours.get(key, (key, 0))
        flat = tail and tensor.shape[-tail:] == (1,) * tail and len(tensor.shape) > tail
        return name, tensor._replace(shape=tensor.shape[:-tail]) if flat else tensor

    found = dict(renamed(*item) for item in header.items())
    misfit = f"{file} is no autoencoder, or built otherwise than the model's"
    params = read_params("vae", shapes, match("vae", shapes, {file: found}, misfit), dtype, place)
    return Component("vae", config, graphdef, params)


def find(path: str | Path) -> Path:
    """The file, or the folder of the autoencoder itself; UserError where there is none."""
    folder = Path(os.path.expanduser(path))
    check_no_pickle(folder)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(
            f"no decoder {folder}: it is a folder with config.json, a model's with vae/ in it, or a "
            ".safetensors file"
        )
    if (folder / FILE).is_file() or not (folder / "config.json").is_file():
        folder /= "vae"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{path} holds no decoder: looked for config.json, and for vae/config.json as in a model's folder"
        )
    return folder
