"""A ControlNet that is to go with a model: a folder of its own."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from engine.config import SIGHTS
from engine.models.controlnet import ControlNetConfig
from engine.models.unet_config import EncoderConfig
from engine.types import UserError
from engine.weights import index
from engine.weights.component import Component, Place, load_component, read_config, write_component
from engine.weights.files import new_folder, read_json, write_json
from engine.weights.folder import Model

KIND = "_control_kind"  # in config.json, a note of ours, which others leave alone


def load_controlnet(
    model: Model, path: str | Path, dtype: DTypeLike = jnp.float32, place: Place | None = None
) -> Component:
    """Reads a ControlNet of a model; `dtype` and `place` as in `load_component`.

    Args:
      path: a folder with config.json and safetensors.

    Raises:
      UserError: there is none, it is broken, or it was made for another model.
    """
    _check_fits(look(path), model, folder := find(path))
    return load_component(folder, "controlnet", dtype, place=place)


def look(path: str | Path) -> ControlNetConfig:
    """The config of the one in a folder; UserError as above, but for what the model has to say."""
    return read_config(find(path) / "config.json", "controlnet")


def kind_of(path: str | Path) -> str:
    """What the one in a folder learned to be shown of pictures, one of SIGHTS; "" where it does not say."""
    kind = read_json(find(path) / "config.json").get(KIND)
    return kind if kind in SIGHTS else ""


def save_controlnet(folder: str | Path, part: Component, kind: str, overwrite: bool = False) -> None:
    """Writes one in float16, for here and for PyTorch diffusers; `kind` as `kind_of` gives it back.

    Raises:
      UserError: the folder exists, or a value does not fit into float16.
    """
    with new_folder(Path(folder), "config.json", overwrite) as new:
        write_component(new, part, jnp.float16)
        if kind:
            write_json(new / "config.json", read_json(new / "config.json") | {KIND: kind})


def find(path: str | Path) -> Path:
    """The folder; UserError where there is none."""
    folder = Path(os.path.expanduser(path))
    if not (folder / "config.json").is_file():
        if (folder / index.FILE).is_file():
            raise UserError(f"{path} is a model, no ControlNet: write the folder of one")
        what = f"{path} has no config.json" if folder.is_dir() else f"no ControlNet {path}"
        raise UserError(f"{what}: a ControlNet is a folder with config.json and safetensors")
    return folder


def config_for(model: Model) -> ControlNetConfig:
    """Of a new one: the way down and the middle of the model's U-Net."""
    unet, scale = model.unet.config, model.vae.config.scale
    shared = {field.name: getattr(unet, field.name) for field in dataclasses.fields(EncoderConfig)}
    shared["mid_block_type"] = unet.mid_block_type or "UNetMidBlock2D"
    widths = ControlNetConfig.conditioning_embedding_out_channels
    count = scale.bit_length()  # each but the first halves the picture
    widths = (*widths, *[widths[-1]] * (count - len(widths)))[:count]
    return ControlNetConfig(**shared, conditioning_embedding_out_channels=widths)


# What must be that of the model, in words where its name in config.json does not say it.
SAME = {
    "in_channels": "in_channels",
    "scale": "pixels a side to a latent",
    "skip_channels": "channels of its skips",
    "layers_per_block": "layers_per_block",
    "downsample_padding": "downsample_padding",
    "cross_attention_dim": "cross_attention_dim",
    "addition_embed_type": "addition_embed_type",
    "addition_time_embed_dim": "addition_time_embed_dim",
    "projection_class_embeddings_input_dim": "projection_class_embeddings_input_dim",
}


def _check_fits(config: ControlNetConfig, model: Model, where: Path) -> None:
    """UserError where what it adds does not fit to the U-Net, or what it sees not to the model."""
    unet, vae = model.unet.config, model.vae.config
    if index.channels(unet, vae) == index.FOLLOWS:
        raise UserError("this model changes pictures as it is told, and takes no ControlNet: leave it out")
    ours: dict[str, Any] = {"in_channels": vae.latent_channels, "scale": vae.scale}
    for name, told in SAME.items():
        theirs, wanted = _value(config, name), ours[name] if name in ours else _value(unet, name)
        if theirs != wanted:
            raise UserError(
                f"the ControlNet {where} was made for another model: {told} {theirs}, and here {wanted}; "
                "write one that was made for this model"
            )


def _value(config: EncoderConfig, name: str) -> Any:
    per_block = name in ("layers_per_block", "cross_attention_dim")
    return config.per_block(name) if per_block else getattr(config, name)
