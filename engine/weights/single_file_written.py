"""Folders of models made into single files, in the original layout of Stable Diffusion 1, 2 and XL.

This goes tensor by tensor, on the host, as the other way (engine.weights.single_file). The configs go into
the file's metadata, so that the other way leads back to the same folder, whatever the convention; programs
that go by convention do not read them, and a line says so where it matters.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from engine.config import to_json
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.models.unet_config import UNetConfig
from engine.types import UserError
from engine.weights import names
from engine.weights.arrays import cast
from engine.weights.component import abstract, find_sources, listed, read_config
from engine.weights.files import new_file
from engine.weights.folder import read_scheduler
from engine.weights.index import ZEROS, read_index
from engine.weights.kinds import KNOWN
from engine.weights.original_configs import XL, Family, family_with, told_by_shapes
from engine.weights.original_names import Slot
from engine.weights.safetensors_io import DTYPES, Tensor, as_dtype, read_tensor, write
from engine.weights.single_file import (
    EDM_ENDS,
    EDM_LATENTS,
    METADATA,
    NO_SIGNAL_MARK,
    V_MARK,
    slots_of,
)

# What a picture does not depend on, or hardly: no word is lost over it.
UNSEEN = ("sample_size", "force_upcast", "upcast_attention")
UNSEEN += ("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim")
PER_BLOCK = ("layers_per_block", "attention_head_dim", "cross_attention_dim", "transformer_layers_per_block")
PER_BLOCK += ("only_cross_attention",)
EDM = "of an EDM"
# What each of `_marks` tells.
_OF_NOISE = (("scheduler", "prediction_type"), ("scheduler", EDM))
_OF_LATENTS = (*_OF_NOISE, ("vae", "latents_mean"), ("vae", "latents_std"))
TOLD_BY = {
    V_MARK: _OF_NOISE[:1],
    NO_SIGNAL_MARK: (("scheduler", "rescale_betas_zero_snr"),),
    **dict.fromkeys(EDM_LATENTS.values(), _OF_LATENTS),
    **dict.fromkeys(EDM_ENDS.values(), _OF_NOISE),
}


def to_file(
    folder: str | Path, file: str | Path, dtype: DTypeLike | None = None, overwrite: bool = False
) -> list[str]:
    """Writes a diffusers folder as a single file, whole or not at all.

    The text encoder of a model like Stable Diffusion 2 is written as far as it is used: without the last
    layer and the projection, as by diffusers' own converter.

    Args:
      file: its name ends in .safetensors.
      dtype: float32, float16 or bfloat16; None keeps the type of each tensor.

    Returns:
      What one should know: a line where other programs will take the model for another.

    Raises:
      UserError: the folder is not sound, or its U-Net has no place in the layout; the file exists.
      OSError: no space left, or the place cannot be written.
    """
    folder, file = (Path(os.path.expanduser(path)) for path in (folder, file))
    scheduler = read_scheduler(folder)
    if file.is_dir():
        raise UserError(f"{file} is a folder: choose another name for the file")
    if file.exists() and not overwrite:
        raise UserError(f"{file} already exists: choose another file, or say overwrite=True")
    index = read_index(folder)
    configs = {kind: read_config(folder / kind / "config.json", kind) for kind in index.kinds}
    family = family_with(configs)
    for kind, config in configs.items():
        if (found := KNOWN[kind].of(config)) is not KNOWN[kind]:
            raise UserError(
                f"{folder}: {kind} is a {found.class_name}, which has no place in a single file; "
                f"only {KNOWN[kind].class_name} has"
            )
    parts = _gather(folder, family, configs)
    if file.resolve() in {one.file.resolve() for stored in parts.values() for one in stored}:
        raise UserError(f"{file} is a part of {folder}, which would be lost: choose another file")
    shapes = {key: stored.slot.shape(stored.shape) for key, (stored, *_) in parts.items()}
    kept = None if dtype is None else as_dtype(dtype)
    dtypes = {
        key: kept or np.dtype(jnp.result_type(*(DTYPES[one.tensor.code] for one in stored)))
        for key, stored in parts.items()
    }
    notes = {kind: to_json(config, KNOWN[kind].class_name) for kind, config in configs.items()}
    notes["scheduler"] = scheduler.to_json()
    notes |= {ZEROS: index.zeros} if "text_encoder_2" in configs else {}
    marks = _marks(family, configs, scheduler)
    told = _surprises(file, shapes, family, configs, scheduler, index.zeros, marks)
    shapes |= {key: array.shape for key, array in marks.items()}
    dtypes |= dict.fromkeys(marks, np.dtype(np.float32))
    with contextlib.ExitStack() as stack, new_file(file) as new:
        files = {one.file for stored in parts.values() for one in stored}
        opened = {file: stack.enter_context(open(file, "rb")) for file in files}

        def tensor(key: str) -> np.ndarray:
            if key in marks:
                return marks[key]
            arrays = [read_tensor(opened[one.file], one.name, one.tensor) for one in parts[key]]
            arrays = [cast(array, dtypes[key], f"{folder}: {key}") for array in arrays]
            arrays = [
                array.T if one.slot.transposed else array
                for array, one in zip(arrays, parts[key], strict=True)
            ]
            return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).reshape(shapes[key])

        write(new, shapes, dtypes, tensor, {METADATA: json.dumps(notes)})
    return told


class _Stored(NamedTuple):
    """A tensor of a folder: where it is, and where it goes."""

    file: Path
    name: str
    tensor: Tensor
    shape: names.Shape  # in PyTorch's order of axes
    slot: Slot


def _gather(folder: Path, family: Family, configs: Mapping[str, Any]) -> dict[str, list[_Stored]]:
    """Key in the original layout -> the tensor of the folder that becomes it, or the three of them."""
    parts: dict[str, list[_Stored]] = {}
    for kind, config in configs.items():
        _, shapes = abstract(kind, config)
        sources = find_sources(folder / kind, kind, config)
        places = slots_of(kind, config, names.keys(shapes), family, folder / kind / "config.json")
        for file, tensors in sources.items():
            for path, (name, tensor) in tensors.items():
                shape = names.torch_shape(path, shapes[path].shape)
                slot = places[names.to_key(path)]
                parts.setdefault(slot.key, []).append(_Stored(file, name, tensor, shape, slot))
    for stored in parts.values():
        stored.sort(key=lambda one: one.slot.third or 0)
    return parts


def _marks(family: Family, configs: Mapping[str, Any], scheduler: SchedulerConfig) -> dict[str, np.ndarray]:
    """By which other programs know what an XL was trained to predict, and in which noise."""
    if family is not XL:
        return {}
    vae, marks = configs["vae"], {}
    if scheduler.is_edm and vae.latents_mean is not None:
        found = {key: getattr(vae, name) for name, key in EDM_LATENTS.items()}
        return {key: np.float32(values).reshape(1, -1, 1, 1) for key, values in found.items()}
    if scheduler.is_edm and scheduler.prediction_type == "v_prediction":
        return {key: np.float32([getattr(scheduler, name)]) for name, key in EDM_ENDS.items()}
    if scheduler.prediction_type == "v_prediction":
        marks[V_MARK] = np.zeros(1, np.float32)
    if scheduler.rescale_betas_zero_snr:
        marks[NO_SIGNAL_MARK] = np.zeros(1, np.float32)
    return marks


def _surprises(
    file: Path,
    shapes: Mapping[str, names.Shape],
    family: Family,
    configs: Mapping[str, Any],
    scheduler: SchedulerConfig,
    zeros: bool,
    marks: Mapping[str, np.ndarray],
) -> list[str]:
    """Where a program that goes by convention would take the model for another."""
    header = {key: Tensor("F32", tuple(shape), 0, 0) for key, shape in shapes.items()}
    usual = told_by_shapes(header, family, file)
    usual["scheduler"] = _schedule(SchedulerConfig.from_json(family.architecture.scheduler, family.name))
    usual["index"] = {ZEROS: family.zeros}
    ours = {kind: _spread(config) for kind, config in configs.items()}
    ours |= {"scheduler": _schedule(scheduler), "index": {ZEROS: zeros}}
    for kind, name in (each for mark in marks for each in TOLD_BY[mark]):
        usual[kind][name] = ours[kind][name]
    usual["unet"] |= {name: _wide(usual["unet"][name], configs["unet"]) for name in PER_BLOCK}
    differing = [
        f"{kind} {name} {_narrow(value)}, not {_narrow(ours[kind][name])}"
        for kind, options in usual.items()
        for name, value in options.items()
        if name not in UNSEEN and value != ours[kind][name]
    ]
    if not differing:
        return []
    return [
        f"{file}: programs that do not read its metadata take it for a {family.name}, and draw other "
        f"pictures with it: {listed(differing)}"
    ]


def _spread(config: Any) -> dict[str, Any]:
    """The options of a config, with one value for each block of a U-Net, however it was written."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, UNetConfig):
        options |= {name: config.per_block(name) for name in PER_BLOCK}
    return options


def _wide(value: Any, config: UNetConfig) -> tuple:
    return value if isinstance(value, tuple) else (value,) * len(config.down_block_types)


def _narrow(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _schedule(scheduler: SchedulerConfig) -> dict[str, Any]:
    """What belongs to a model; the rest of its scheduler is a matter of taste."""
    fields = ("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    options = {name: getattr(scheduler, name) for name in (*fields, "rescale_betas_zero_snr")}
    return options | {EDM: scheduler.is_edm}
