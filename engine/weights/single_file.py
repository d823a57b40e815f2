"""Single files of Stable Diffusion 1 and 2, in the original layout, made into folders.

This goes tensor by tensor, on the host: the memory needed is that of the largest. Names are those of
engine.weights.original_names, configs follow as engine.weights.original_configs says, or stand in the
metadata of a file that engine.weights.single_file_written wrote. The tokenizer is not in such a file: it is
read from a folder that has one.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from engine.diffusion.scheduler_config import SchedulerConfig
from engine.text.tokenizer import Tokenizer
from engine.types import UserError
from engine.weights import names
from engine.weights.component import KINDS, abstract, listed, write_config, write_weights
from engine.weights.files import new_folder
from engine.weights.folder import check_parts_fit, write_rest
from engine.weights.index import FILE, check_no_pickle
from engine.weights.original_configs import Family, Header, built, family_of, told_by_shapes
from engine.weights.original_names import CLIP, OPEN_CLIP, THIRDS, UNET, VAE, Slot, slots
from engine.weights.safetensors_io import (
    DTYPES,
    Tensor,
    as_dtype,
    cast,
    read_header,
    read_metadata,
    read_tensor,
)

PREFIXES = (UNET, VAE, CLIP, OPEN_CLIP)
METADATA = "fogsculpt"
SUFFIX = ".safetensors"
V_PREDICTION_SIZE, EPSILON_SIZE = 96, 64  # of the latents that Stable Diffusion 2 was trained on

# Beside the weights. Of the text encoder of 2: what only its training or its pictures need.
NO_WEIGHTS = re.compile(
    rf"{re.escape(OPEN_CLIP)}(text_projection|logit_scale|attn_mask)$|{re.escape(VAE)}(loss|model_ema)\."
)
AVERAGED = "model_ema."
BUFFERS = re.compile(
    r"(betas|\w*alphas_cumprod(_prev)?|posterior_\w+|lvlb_weights|logvar|global_step|optimizer\w*)(\.|$)"
)
SCALE, V_MARK = "scale_factor", "v_pred"  # of some files: the vae's scaling_factor; a mark for v-prediction


class Single(NamedTuple):
    """A file, understood."""

    path: Path
    family: Family
    by_convention: bool  # its configs: they are not in the file
    configs: dict[str, Any]
    scheduler: SchedulerConfig
    tensors: dict[str, dict[str, Tensor]]  # kind -> key in the diffusers layout -> where it is
    notes: list[str]  # what one should know


def to_folder(
    file: str | Path,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    dtype: DTypeLike | None = None,
    prediction_type: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes the diffusers folder of a single file, whole or not at all.

    Args:
      tokenizer: a folder with vocab.json and merges.txt, or the model's folder around it. It is needed, but
        asked for only when all else is known to be right.
      dtype: float32, float16 or bfloat16; None keeps the type of each tensor.
      prediction_type: "epsilon", "v_prediction" or "sample"; None: what the file says, else "epsilon" for
        Stable Diffusion 1 and for inpainting, and "v_prediction" for 2, as in diffusers.

    Returns:
      What one should know: a line for each thing that was assumed, or not read.

    Raises:
      UserError: the file is none of Stable Diffusion 1 or 2, or not whole; the tokenizer is another model's;
        the folder exists, or would replace the file.
      OSError: no space left, or the place cannot be written.
    """
    file, folder = (Path(os.path.expanduser(path)) for path in (file, folder))
    if folder.resolve() in file.resolve().parents:
        raise UserError(f"{folder} holds {file}, which it would replace: choose another folder")
    single = understand(file, prediction_type)
    if not tokenizer:
        raise UserError(
            f"{file} has no tokenizer, as no single file has: write --tokenizer FOLDER, the tokenizer/ of a "
            f"folder of {single.family.name}"
        )
    words = _tokenizer(single, Path(os.path.expanduser(tokenizer)))
    kept = None if dtype is None else as_dtype(dtype)
    with new_folder(folder, FILE, overwrite) as new, open(file, "rb") as opened:
        configs = _with_marks(single, words)
        for kind, config in configs.items():
            (new / kind).mkdir()
            write_config(new / kind, kind, config)
            _write_weights(new / kind, kind, config, single.tensors[kind], opened, kept)
        write_rest(new, {"text_encoder": words}, single.scheduler, configs)
    return single.notes


def _write_weights(
    folder: Path, kind: str, config: Any, tensors: dict[str, Tensor], file: BinaryIO, dtype: np.dtype | None
) -> None:
    _, shapes = abstract(kind, config)
    dtypes = {key: dtype or DTYPES[tensor.code] for key, tensor in tensors.items()}

    def tensor(key: str) -> np.ndarray:
        return cast(read_tensor(file, key, tensors[key]), dtypes[key], f"{file.name}: {kind} {key}")

    write_weights(folder, kind, shapes, dtypes, tensor)


def understand(path: Path, prediction_type: str | None = None) -> Single:
    """Reads the header of a file, and finds every tensor of the model in it.

    Raises:
      UserError: it is broken, something else than Stable Diffusion 1 or 2, or not whole; in the last case
        all keys that are missing, unexpected or wrongly shaped are in one line.
    """
    check_no_pickle(path)
    if not path.is_file():
        raise UserError(f"no file {path}: write the path of a {SUFFIX} file")
    header = read_header(path)
    family = family_of(header, path)
    notes = _read_notes(path)
    if notes is None:
        options = told_by_shapes(header, family, path)
        predicted = prediction_type or _predicted(header, family, options["unet"]["in_channels"])
        size = V_PREDICTION_SIZE if _is_second(family) and predicted == "v_prediction" else EPSILON_SIZE
        options["unet"]["sample_size"] = size
        options["vae"] |= _read_scale(path, header)
        configs = {kind: built(kind, option, path) for kind, option in options.items()}
        scheduler = SchedulerConfig.from_json(family.architecture.scheduler, family.name)
    else:
        configs, scheduler = notes
        predicted = prediction_type or scheduler.prediction_type
    scheduler = dataclasses.replace(scheduler, prediction_type=predicted)
    told = _told_of(path, header, configs["unet"].in_channels != configs["vae"].latent_channels)
    if notes is None and prediction_type is None and _is_second(family) and V_MARK not in header:
        other = "epsilon" if predicted == "v_prediction" else "v_prediction"
        told.append(
            f"{path} does not say what it predicts: taken for {predicted}, as most of {family.name}; if it "
            f"draws noise, convert it with --prediction_type {other}"
        )
    return Single(path, family, notes is None, configs, scheduler, _find(path, header, configs), told)


def _is_second(family: Family) -> bool:
    return family.text == OPEN_CLIP


def _predicted(header: Header, family: Family, in_channels: int) -> str:
    """What the U-Net was trained to predict. Those of 2 that look at pictures as well predict eps."""
    return "v_prediction" if V_MARK in header or (_is_second(family) and in_channels == 4) else "epsilon"


def _read_scale(path: Path, header: Header) -> dict[str, float]:
    """The scaling_factor that some files have: those of models that measured it."""
    scale = header.get(SCALE)
    if scale is None or scale.code not in DTYPES or math.prod(scale.shape) != 1:
        return {}
    with open(path, "rb") as file:
        return {"scaling_factor": float(read_tensor(file, SCALE, scale).reshape(()))}


def _read_notes(path: Path) -> tuple[dict[str, Any], SchedulerConfig] | None:
    """The configs in the metadata of a file that was written here; None in others."""
    text = read_metadata(path).get(METADATA)
    if text is None:
        return None
    where = f"{path}: metadata {METADATA}"
    try:
        notes = json.loads(text)
        options = {kind: dict(notes[kind]) for kind in (*KINDS, "scheduler")}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{where} are no configs of a model: write the file again") from None
    configs = {kind: KINDS[kind].config.from_json(options[kind], f"{where}: {kind}") for kind in KINDS}
    return configs, SchedulerConfig.from_json(options["scheduler"], f"{where}: scheduler")


def _told_of(path: Path, header: Header, edits: bool) -> list[str]:
    """A line for each thing that is not read. edits: the U-Net looks at a picture, too."""
    outside = [
        key for key in header if not key.startswith((*PREFIXES, SCALE, V_MARK)) and not BUFFERS.match(key)
    ]
    averaged = [key for key in outside if key.startswith(AVERAGED)]
    others = [key for key in outside if not key.startswith(AVERAGED)]
    told = []
    if edits:
        told.append(f"{path} edits pictures, which this version does not: the folder does not draw by itself")
    if averaged:
        told.append(f"not read: {len(averaged)} averaged weights ({AVERAGED}*); {UNET}* were")
    if others:
        told.append(f"not read, because they are no weights of the model: {listed(others, 5)}")
    return told


def _find(path: Path, header: Header, configs: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Kind -> key in the diffusers layout -> its bytes in the file; UserError unless all fits exactly."""
    stored = _weights(header, configs["text_encoder"].num_hidden_layers)
    missing, misshapen, mistyped, used = {}, {}, {}, set()
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in configs}
    for kind, config in configs.items():
        _, shapes = abstract(kind, config)
        paths = names.keys(shapes)
        for key, slot in slots_of(kind, config, paths, path).items():
            shape = names.torch_shape(paths[key], shapes[paths[key]].shape)
            if slot.key not in stored:
                missing[slot.key] = slot.key
                continue
            used.add(slot.key)
            name, tensor = stored[slot.key]
            wanted = slot.shape(shape)
            if tensor.shape not in (wanted, shape + slot.tail[:1], *([shape] if slot.tail else [])):
                misshapen[name] = f"{name} is {tensor.shape}, not {wanted}"
            if tensor.code not in DTYPES:
                mistyped[name] = f"{name} is {tensor.code}"
            found[kind][key] = _part(tensor, slot, shape)
    faults = {
        "missing": missing,
        "unexpected": {name: name for key, (name, _) in stored.items() if key not in used},
        "wrong shape": misshapen,
        f"no type of {', '.join(DTYPES)}": mistyped,
    }
    if any(faults.values()):
        told = "; ".join(f"{fault}: {listed([*keys.values()])}" for fault, keys in faults.items() if keys)
        raise UserError(f"{path} is not whole, or of another model: {told}")
    return found


def slots_of(kind: str, config: Any, keys: Mapping[str, Any], where: Path) -> dict[str, Slot]:
    """`slots`, with the place in its message."""
    try:
        return slots(kind, config, keys)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _weights(header: Header, layers: int) -> dict[str, tuple[str, Tensor]]:
    """Key in the original layout -> the file's own name for it, and the tensor, for all of the model's.

    Args:
      layers: of the text encoder; one more of 2's is left out (see `original_configs`).
    """
    last = f"{OPEN_CLIP}transformer.resblocks.{layers}."
    found = {}
    for name, tensor in header.items():
        key = name
        if name.startswith(CLIP):
            own = names.canonical("text_encoder", name.removeprefix(CLIP))
            key = own and CLIP + own
        ours = key and key.startswith(PREFIXES)
        if ours and not NO_WEIGHTS.match(key) and not key.startswith(last):
            found[key] = (name, tensor)
    return found


def _part(tensor: Tensor, slot: Slot, shape: names.Shape) -> Tensor:
    """Our tensor within one of the file: all of its bytes, or a third of them, which are rows."""
    if slot.third is None:
        return tensor._replace(shape=shape)
    size = (tensor.end - tensor.start) // THIRDS
    start = tensor.start + slot.third * size
    return Tensor(tensor.code, shape, start, start + size)


def _tokenizer(single: Single, folder: Path) -> Tokenizer:
    """The tokenizer in a folder, or in its tokenizer/; UserError where it is another model's."""
    folder = folder / "tokenizer" if (folder / FILE).is_file() else folder
    tokenizer, text = Tokenizer.load(folder), single.configs["text_encoder"]
    check_parts_fit(single.configs, {"text_encoder": tokenizer}, single.path)
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise UserError(
            f"{folder} has texts of {tokenizer.model_max_length} tokens, {single.path} of "
            f"{text.max_position_embeddings}: take the tokenizer of this model"
        )
    if not single.by_convention:
        return tokenizer
    if tokenizer.vocab_size != text.vocab_size:
        raise UserError(
            f"{folder} has {tokenizer.vocab_size} ids, the text encoder of {single.path} {text.vocab_size}: "
            f"take the tokenizer/ of a folder of {single.family.name}"
        )
    # The U-Net looks at what fills a prompt up, too. The two fill up with different tokens.
    wanted = 0 if _is_second(single.family) else tokenizer.eos_id
    if tokenizer.pad_id != wanted:
        raise UserError(
            f"{folder} fills prompts up with id {tokenizer.pad_id}, {single.family.name} with {wanted}: "
            f"take the tokenizer/ of a folder of {single.family.name}"
        )
    return tokenizer


def _with_marks(single: Single, tokenizer: Tokenizer) -> dict[str, Any]:
    """The configs; where they are by convention, with the tokenizer's ids of the special tokens."""
    if not single.by_convention:
        return single.configs
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_id") for mark in ("bos", "eos", "pad")}
    return single.configs | {"text_encoder": dataclasses.replace(single.configs["text_encoder"], **marks)}
