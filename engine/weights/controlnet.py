"""A ControlNet or T2I-Adapter that is to go with a model: a folder of its own, or a single file.

A file does not say what it was built like, but for the shapes of its weights: it is taken for the way down
and the middle of the U-Net that it is to go with, under the names of diffusers or of its original. One whose
answer is the mean of all places ("shuffle") is known by its name alone, and not read. What is of adapters
alone is in engine.weights.t2i_adapter.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from engine.config import SIGHTS
from engine.models.controlnet import ControlNetConfig
from engine.models.controlnet_union import ControlNetUnionConfig
from engine.models.t2i_adapter import T2IAdapterConfig
from engine.models.unet_config import EncoderConfig
from engine.types import UserError
from engine.weights import component, index, names, t2i_adapter
from engine.weights.component import (
    Component,
    Place,
    abstract,
    load_component,
    match,
    read_config,
    read_headers,
    read_params,
    write_component,
)
from engine.weights.files import PICKLES, find_weights, new_folder, read_json, write_json
from engine.weights.folder import Model
from engine.weights.kinds import KNOWN
from engine.weights.original_names import CONTROLNET, slots
from engine.weights.safetensors_io import Tensor, as_dtype, read_header

# The first convolution that sees the picture -> where those behind it are, counted from 0.
HINTS: Mapping[str, Callable[[int], str]] = {
    "controlnet_cond_embedding.conv_in.weight": "controlnet_cond_embedding.blocks.{}.weight".format,
    f"{CONTROLNET}input_hint_block.0.weight": lambda i: f"{CONTROLNET}input_hint_block.{2 * i + 2}.weight",
    "input_hint_block.0.weight": lambda i: f"input_hint_block.{2 * i + 2}.weight",
}
OTHERS = {
    "difference": "what is to be added to a model's weights",
    "lora_controlnet": "a control-LoRA",
}
SUFFIX = ".safetensors"
# What its folder's own weights are called, whole or in shards; others that lie beside them are files.
OF_FOLDER = re.compile(rf"{KNOWN['controlnet'].stem}(\.fp16)?(-\d+-of-\d+)?(\.fp16)?{re.escape(SUFFIX)}")
TASKS, WIDTH = "task_embedding", "spatial_ch_projs.weight"  # by which a union is known, and seen
SHUFFLE = "shuffle"  # in the names of those whose answer is the mean of all places
KIND = "_control_kind"  # in config.json, a note of ours, which others leave alone


def load_controlnet(
    model: Model, path: str | Path, dtype: DTypeLike = jnp.float32, place: Place | None = None
) -> Component:
    """Reads a ControlNet or T2I-Adapter of a model; `dtype` and `place` as in `load_component`.

    Args:
      path: a folder with config.json and safetensors, or a file.

    Raises:
      UserError: there is none, it is broken, or it was made for another model.
    """
    config = look(path)
    if index.channels(model.unet.config, model.vae.config) == index.FOLLOWS:
        raise UserError("this model changes pictures as it is told, and takes no ControlNet: leave it out")
    if config is None:
        return _from_file(model, find(path), as_dtype(dtype), place)
    if isinstance(config, ControlNetUnionConfig):
        _check_fits(config, model, folder := find(path))
        return _read(config, _headers(folder), folder, as_dtype(dtype), place)
    check = _check_fits if isinstance(config, ControlNetConfig) else t2i_adapter.check_fits
    check(config, model, folder := find(path))
    return load_component(folder, "controlnet", dtype, place=place)


def look(path: str | Path) -> ControlNetConfig | T2IAdapterConfig | None:
    """The config of the one in a folder, None of a file; UserError as above, but for what the model says."""
    if (found := find(path)).is_dir():
        return _union_in(found) if kinds_known(found) else read_config(found / "config.json", "controlnet")
    if not t2i_adapter.is_one(header := read_header(found)):
        _hints(header, found)
    return None


def kinds_known(path: str | Path) -> int:
    """How many kinds of pictures a union sees; 0 of one that is none. UserError where there is nothing."""
    files = [found] if (found := find(path)).is_file() else _weights(found)
    tasks = [header[TASKS].shape for header in map(read_header, files) if TASKS in header]
    return tasks[0][0] if tasks and tasks[0] else 0


def _weights(folder: Path) -> list[Path]:
    """The files of the weights of one in a folder; none, where they are missing."""
    return sorted(file for file in folder.iterdir() if OF_FOLDER.fullmatch(file.name))


def _headers(folder: Path) -> dict[Path, dict[str, Tensor]]:
    return read_headers(component.find_weights(folder, KNOWN["controlnet"].stem, None))


def _union_in(folder: Path) -> ControlNetUnionConfig:
    """Of a folder, which may call it a plain ControlNet, and leave out what the shapes of weights tell."""
    file, headers = folder / "config.json", _headers(folder)
    header = {key: tensor for each in headers.values() for key, tensor in each.items()}
    return ControlNetUnionConfig.from_json(read_json(file) | _union(header, folder), str(file))


def _union(header: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """What the shapes of a union's weights tell of its config; UserError where they tell nothing."""
    tasks, width = (header[key].shape if key in header else () for key in (TASKS, WIDTH))
    layers = {key.split(".")[1] for key in header if key.startswith("transformer_layes.")}
    if len(tasks) != 2 or len(width) != 2:
        raise UserError(f"{where} is no whole ControlNet union: it lacks a matrix {TASKS} or {WIDTH}")
    return {
        "num_control_type": tasks[0],
        "num_trans_channel": tasks[1],
        "num_trans_layer": len(layers),
        "num_proj_channel": width[0],
        "conditioning_embedding_out_channels": _hints(header, where),
    }


def _from_file(model: Model, file: Path, dtype: np.dtype, place: Place | None) -> Component:
    header = read_header(file)
    if t2i_adapter.is_one(header):
        header = t2i_adapter.renamed(header)
        return _read(t2i_adapter.config_of(header, model, file), {file: header}, file, dtype, place)
    config = dataclasses.replace(config_for(model), conditioning_embedding_out_channels=_hints(header, file))
    if TASKS in header:
        shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        told = {"mid_block_type": "UNetMidBlock2DCrossAttn", **_union(header, file)}
        try:
            config = ControlNetUnionConfig(**shared | told)
        except UserError as error:
            raise UserError(f"{file} is a ControlNet union of another model: {error}") from None
    _check_fits(config, model, file)
    if not any(key in header for key in HINTS if key.startswith("controlnet_")):
        prefix = CONTROLNET if any(key.startswith(CONTROLNET) for key in header) else ""
        _, shapes = abstract("controlnet", config)
        places = slots("controlnet", config, names.keys(shapes), prefix)
        ours = {slot.key: key for key, slot in places.items()}
        # Beside it may be the whole model that it was trained beside.
        header = {ours.get(key, key): each for key, each in header.items() if key.startswith(prefix)}
    return _read(config, {file: header}, file, dtype, place)


def _read(
    config: ControlNetConfig | T2IAdapterConfig,
    headers: Mapping[Path, Mapping[str, Tensor]],
    where: Path,
    dtype: np.dtype,
    place: Place | None,
) -> Component:
    """headers: of files, with the keys of diffusers."""
    graphdef, shapes = abstract("controlnet", config)
    what = "ControlNet" if isinstance(config, ControlNetConfig) else "T2I-Adapter"
    misfit = (
        f"{where} is no {what} of this model, or built otherwise than its U-Net, which the folder of one "
        "tells alone (names as in diffusers)"
    )
    sources = match("controlnet", shapes, headers, misfit)
    params = read_params("controlnet", shapes, sources, dtype, place)
    return Component("controlnet", config, graphdef, params)


def _hints(header: Mapping[str, Tensor], file: Path) -> tuple[int, ...]:
    """Channels by which the one in a file sees its picture; UserError where it holds none that is read."""
    if SHUFFLE in file.name.lower():
        raise UserError(f"{file} answers with the mean of all places ({SHUFFLE}), which is not read")
    for end, what in OTHERS.items():
        if any(key.endswith(end) for key in header):
            raise UserError(f"{file} is {what}, which is not read: write a ControlNet that stands by itself")
    first = next((first for first in HINTS if header.get(first) and header[first].shape), None)
    if first is None:
        raise UserError(f"{file} holds no ControlNet: it has none of {', '.join(HINTS)}")
    widths = [header[first].shape[0]]
    for i in itertools.count(1, 2):  # of each pair of convolutions the second is wider
        tensor = header.get(HINTS[first](i))
        if tensor is None or not tensor.shape:
            return tuple(widths)
        widths.append(tensor.shape[0])


def kind_of(path: str | Path) -> str:
    """What the one in a folder learned to be shown of pictures, one of SIGHTS; "" where it does not say."""
    if not (found := find(path)).is_dir():
        return ""
    kind = read_json(found / "config.json").get(KIND)
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
    """The folder or the file, of weights in a folder that folder; UserError where there is none."""
    folder = Path(os.path.expanduser(path))
    if folder.is_file() or folder.name.endswith((*PICKLES, SUFFIX)):
        file = find_weights(folder, "ControlNet", "or the folder of one")
        of_folder = OF_FOLDER.fullmatch(file.name) and (file.parent / "config.json").is_file()
        return file.parent if of_folder else file
    if not (folder / "config.json").is_file():
        if (folder / index.FILE).is_file():
            raise UserError(f"{path} is a model, no ControlNet: write the folder of one")
        what = f"{path} has no config.json" if folder.is_dir() else f"no ControlNet {path}"
        raise UserError(
            f"{what}: a ControlNet is a folder with config.json and safetensors, or a .safetensors file"
        )
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
