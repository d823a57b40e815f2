"""Single files of Stable Diffusion 1, 2 and XL, in the original layout, made into folders.

This goes tensor by tensor, on the host: the memory needed is that of the largest. Names are those of
engine.weights.original_names, configs follow as engine.weights.original_configs says, or stand in the
metadata of a file that engine.weights.single_file_written wrote. The tokenizer is not in such a file: it is
read from a folder that has one. XL has two, which differ in what fills a prompt up.
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
from engine.types import UserError
from engine.weights import names
from engine.weights.arrays import cast
from engine.weights.component import abstract, listed, write_config, write_weights
from engine.weights.files import new_folder
from engine.weights.folder import TOKENIZERS, write_rest
from engine.weights.index import FILE, FOLLOWS, INPAINTS, ZEROS, channels, check_no_pickle
from engine.weights.kinds import KNOWN
from engine.weights.original_configs import SECOND, Family, Header, built, family_of, told_by_shapes
from engine.weights.original_names import (
    AS_IN_TRANSFORMERS,
    OPEN_CLIP,
    PROJECTION,
    REFINER_OPEN_CLIP,
    THIRDS,
    UNET,
    VAE,
    XL_OPEN_CLIP,
    Slot,
    slots,
)
from engine.weights.safetensors_io import (
    DTYPES,
    Tensor,
    as_dtype,
    read_header,
    read_metadata,
    read_tensor,
)
from engine.weights.single_file_tokenizers import read_tokenizers, with_marks

METADATA = "fogsculpt"
SUFFIX = ".safetensors"
V_PREDICTION_SIZE, EPSILON_SIZE = 96, 64  # of the latents that Stable Diffusion 2 was trained on

# Beside the weights. Of the text encoders: what only their training, or that of 2 its pictures need.
_OPEN_CLIPS = "|".join(map(re.escape, (OPEN_CLIP, XL_OPEN_CLIP, REFINER_OPEN_CLIP)))
NO_WEIGHTS = re.compile(
    rf"({_OPEN_CLIPS})(logit_scale|attn_mask|.*position_ids)$|{re.escape(OPEN_CLIP + PROJECTION)}$"
    rf"|({'|'.join(map(re.escape, AS_IN_TRANSFORMERS))})({PROJECTION}\.weight|logit_scale)$"
    rf"|{re.escape(VAE)}(loss|model_ema)\."
)
AVERAGED = "model_ema."
# The projection of the second text encoder of XL, as some programs write it.
TURNED = tuple(f"{prefix}{PROJECTION}.weight" for prefix in (XL_OPEN_CLIP, REFINER_OPEN_CLIP))
BUFFERS = re.compile(
    r"(betas|\w*alphas_cumprod(_prev)?|posterior_\w+|lvlb_weights|logvar|global_step|optimizer\w*"
    r"|denoiser\.sigmas)(\.|$)"
)
SCALE = "scale_factor"  # of some files: the vae's scaling_factor
V_MARK, NO_SIGNAL_MARK = "v_pred", "ztsnr"  # the same: v-prediction; betas rescaled to end in noise alone
# Of Playground 2.5, an EDM: its latents. Of CosXL, another: the ends of its noise levels.
EDM_LATENTS = {"latents_mean": "edm_mean", "latents_std": "edm_std"}
EDM_ENDS = {"sigma_min": "edm_vpred.sigma_min", "sigma_max": "edm_vpred.sigma_max"}
PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler"}
PLAYGROUND_SCALE = 0.5
MOST_BESIDE = 64  # numbers of a tensor that is none of a network
COSXL = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "sigma_schedule": "exponential"}


class Piece(NamedTuple):
    """A tensor of ours in the file."""

    tensor: Tensor
    transposed: bool

    def read(self, file: BinaryIO, key: str) -> np.ndarray:
        array = read_tensor(file, key, self.tensor)
        return array.T if self.transposed else array


class Single(NamedTuple):
    """A file, understood."""

    path: Path
    family: Family
    by_convention: bool  # its configs: they are not in the file
    configs: dict[str, Any]
    scheduler: SchedulerConfig
    zeros: bool  # see engine.weights.index
    pieces: dict[str, dict[str, Piece]]  # kind -> key in the diffusers layout -> where it is
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
      tokenizer: a folder with vocab.json and merges.txt, or the one around it, with tokenizer/ and for XL
        tokenizer_2/. Without the latter it is the same, filling prompts up with "!", as XL has it. It is
        needed, but asked for only when all else is known to be right.
      dtype: float32, float16 or bfloat16; None keeps the type of each tensor.
      prediction_type: "epsilon", "v_prediction" or "sample"; None: what the file says, else "epsilon" for
        Stable Diffusion 1, XL and for inpainting, and "v_prediction" for 2, as in diffusers.

    Returns:
      What one should know: a line for each thing that was assumed, or not read.

    Raises:
      UserError: the file is none of Stable Diffusion 1, 2 or XL, or not whole; the tokenizer is another
        model's; the folder exists, or would replace the file.
      OSError: no space left, or the place cannot be written.
    """
    file, folder = (Path(os.path.expanduser(path)) for path in (file, folder))
    if folder.resolve() in file.resolve().parents:
        raise UserError(f"{folder} holds {file}, which it would replace: choose another folder")
    single = understand(file, prediction_type)
    if not tokenizer:
        theirs = " and ".join(f"{TOKENIZERS[kind]}/" for kind in single.family.texts)
        raise UserError(
            f"{file} has no tokenizer, as no single file has: write --tokenizer FOLDER, the one with "
            f"{theirs} of a folder of {single.family.name}"
        )
    tokenizers = read_tokenizers(
        Path(os.path.expanduser(tokenizer)), single.path, single.family, single.configs, single.by_convention
    )
    kept = None if dtype is None else as_dtype(dtype)
    with new_folder(folder, FILE, overwrite) as new, open(file, "rb") as opened:
        configs = with_marks(single.configs, tokenizers) if single.by_convention else single.configs
        for kind, config in configs.items():
            (new / kind).mkdir()
            write_config(new / kind, kind, config)
            _write_weights(new / kind, kind, config, single.pieces[kind], opened, kept)
        write_rest(new, tokenizers, single.scheduler, configs, single.zeros)
    return single.notes


def _write_weights(
    folder: Path, kind: str, config: Any, pieces: dict[str, Piece], file: BinaryIO, dtype: np.dtype | None
) -> None:
    _, shapes = abstract(kind, config)
    dtypes = {key: dtype or DTYPES[piece.tensor.code] for key, piece in pieces.items()}

    def tensor(key: str) -> np.ndarray:
        return cast(pieces[key].read(file, key), dtypes[key], f"{file.name}: {kind} {key}")

    write_weights(folder, kind, shapes, dtypes, tensor)


def understand(path: Path, prediction_type: str | None = None) -> Single:
    """Reads the header of a file, and finds every tensor of the model in it.

    Raises:
      UserError: it is broken, something else than Stable Diffusion 1, 2 or XL, or not whole; in the last case
        all keys that are missing, unexpected or wrongly shaped are in one line.
    """
    check_no_pickle(path)
    if not path.is_file():
        raise UserError(f"no file {path}: write the path of a {SUFFIX} file")
    header = read_header(path)
    family = family_of(header, path)
    notes = _read_notes(path, family)
    if notes is None:
        options = told_by_shapes(header, family, path)
        predicted = prediction_type or _predicted(header, family, options["unet"]["in_channels"])
        if family is SECOND:
            size = V_PREDICTION_SIZE if predicted == "v_prediction" else EPSILON_SIZE
            options["unet"]["sample_size"] = size
        options["vae"] |= _read_scale(path, header) | _read_latents(path, header)
        configs = {kind: built(kind, option, path) for kind, option in options.items()}
        noise = _edm(path, header) or family.architecture.scheduler
        scheduler = SchedulerConfig.from_json(noise, family.name)
        if NO_SIGNAL_MARK in header:  # in which pictures begin, on such a grid
            scheduler = dataclasses.replace(
                scheduler, rescale_betas_zero_snr=True, timestep_spacing="trailing"
            )
        zeros = family.zeros
    else:
        configs, scheduler, zeros = notes
        predicted = prediction_type or scheduler.prediction_type
    scheduler = dataclasses.replace(scheduler, prediction_type=predicted)
    takes = channels(configs["unet"], configs["vae"])
    if scheduler.is_edm and takes == FOLLOWS:
        raise UserError(f"{path} is CosXL Edit, which sees pictures in its own way, and is not read")
    told = _told_of(path, header, family, takes)
    if notes is None and prediction_type is None and family is SECOND and V_MARK not in header:
        other = "epsilon" if predicted == "v_prediction" else "v_prediction"
        told.append(
            f"{path} does not say what it predicts: taken for {predicted}, as most of {family.name}; if it "
            f"draws noise, convert it with --prediction_type {other}"
        )
    pieces = _find(path, header, family, configs)
    return Single(path, family, notes is None, configs, scheduler, zeros, pieces, told)


def _predicted(header: Header, family: Family, in_channels: int) -> str:
    """What the U-Net was trained to predict. Those of 2 that look at pictures as well predict eps."""
    marked = any(mark in header for mark in (V_MARK, *EDM_ENDS.values()))
    return "v_prediction" if marked or (family is SECOND and in_channels == 4) else "epsilon"


def _read_scale(path: Path, header: Header) -> dict[str, float]:
    """The scaling_factor that some files have: those of models that measured it."""
    scale = _read_floats(path, header, SCALE)
    return {"scaling_factor": scale[0]} if len(scale) == 1 else {}


def _read_latents(path: Path, header: Header) -> dict[str, Any]:
    """What Playground 2.5 says of its latents."""
    found = {name: _read_floats(path, header, key) for name, key in EDM_LATENTS.items()}
    return {**found, "scaling_factor": PLAYGROUND_SCALE} if all(found.values()) else {}


def _edm(path: Path, header: Header) -> dict[str, Any] | None:
    """The scheduler of a model that was not trained on a table of noise levels; None: of others."""
    if any(key in header for key in EDM_LATENTS.values()):
        return PLAYGROUND
    if not any(key in header for key in EDM_ENDS.values()):
        return None
    ends = {name: _read_floats(path, header, key) for name, key in EDM_ENDS.items()}
    return COSXL | {name: found[0] for name, found in ends.items() if found}


def _read_floats(path: Path, header: Header, key: str) -> tuple[float, ...]:
    """The numbers of a small tensor beside the weights; none where there is none of numbers."""
    tensor = header.get(key)
    if tensor is None or tensor.code not in DTYPES or math.prod(tensor.shape) > MOST_BESIDE:
        return ()
    with open(path, "rb") as file:
        return tuple(map(float, read_tensor(file, key, tensor).ravel()))


def _read_notes(path: Path, family: Family) -> tuple[dict[str, Any], SchedulerConfig, bool] | None:
    """What the metadata of a file that was written here says of the folder; None in others."""
    text = read_metadata(path).get(METADATA)
    if text is None:
        return None
    where = f"{path}: metadata {METADATA}"
    try:
        notes = json.loads(text)
        options = {kind: dict(notes[kind]) for kind in (*family.prefixes, "scheduler")}
        zeros = notes.get(ZEROS, family.zeros) is True
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{where} are no configs of a model: write the file again") from None
    configs = {
        kind: KNOWN[kind].config.from_json(options[kind], f"{where}: {kind}") for kind in family.prefixes
    }
    return configs, SchedulerConfig.from_json(options["scheduler"], f"{where}: scheduler"), zeros


def _told_of(path: Path, header: Header, family: Family, takes: str | None) -> list[str]:
    """A line for each thing that is not read, or to be known. takes: see `index.channels`."""
    beside = (SCALE, V_MARK, NO_SIGNAL_MARK, *EDM_LATENTS.values(), *EDM_ENDS.values())
    known = (*family.prefixes.values(), *beside)
    outside = [key for key in header if not key.startswith(known) and not BUFFERS.match(key)]
    averaged = [key for key in outside if key.startswith(AVERAGED)]
    others = [key for key in outside if not key.startswith(AVERAGED)]
    told = []
    if takes in (INPAINTS, FOLLOWS):
        flags = "--image FILE --mask FILE" if takes == INPAINTS else "--image FILE"
        told.append(f"{path} changes pictures: what it becomes draws with {flags}")
    if averaged:
        told.append(f"not read: {len(averaged)} averaged weights ({AVERAGED}*); {UNET}* were")
    if others:
        told.append(f"not read, because they are no weights of the model: {listed(others, 5)}")
    return told


def _find(
    path: Path, header: Header, family: Family, configs: Mapping[str, Any]
) -> dict[str, dict[str, Piece]]:
    """Kind -> key in the diffusers layout -> its bytes in the file; UserError unless all fits exactly."""
    stored = _weights(header, family, configs)
    missing, misshapen, mistyped, used = {}, {}, {}, set()
    found: dict[str, dict[str, Piece]] = {kind: {} for kind in configs}
    for kind, config in configs.items():
        _, shapes = abstract(kind, config)
        paths = names.keys(shapes)
        for key, slot in slots_of(kind, config, paths, family, path).items():
            shape = names.torch_shape(paths[key], shapes[paths[key]].shape)
            if slot.key not in stored:
                missing[slot.key] = slot.key
                continue
            used.add(slot.key)
            name, tensor = stored[slot.key]
            if name == f"{slot.key}.weight":  # as a layer of PyTorch's, whose order is ours
                slot = slot._replace(transposed=False)
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


def slots_of(kind: str, config: Any, keys: Mapping[str, Any], family: Family, where: Path) -> dict[str, Slot]:
    """`slots`, with the place in its message."""
    try:
        return slots(kind, config, keys, family.prefixes[kind])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _weights(header: Header, family: Family, configs: Mapping[str, Any]) -> dict[str, tuple[str, Tensor]]:
    """Key in the original layout -> the file's own name for it, and the tensor, for all of the model's.

    Of the text encoder of 2, a layer more than in its config is left out (see `original_configs`).
    """
    last = configs["text_encoder"].num_hidden_layers if family is SECOND else None
    left_out = f"{OPEN_CLIP}transformer.resblocks.{last}."
    prefixes = tuple(family.prefixes.values())
    found = {}
    for name, tensor in header.items():
        key = name
        if prefix := next((each for each in AS_IN_TRANSFORMERS if name.startswith(each)), None):
            own = names.canonical("text_encoder", name.removeprefix(prefix))
            key = own and prefix + own
        if key in TURNED:
            key = key.removesuffix(".weight")
        ours = key and key.startswith(prefixes)
        if ours and not NO_WEIGHTS.match(key) and not key.startswith(left_out):
            found[key] = (name, tensor)
    return found


def _part(tensor: Tensor, slot: Slot, shape: names.Shape) -> Piece:
    """Our tensor within one of the file: all of its bytes, or a third of them, which are rows."""
    shape = shape[::-1] if slot.transposed else shape
    if slot.third is None:
        return Piece(tensor._replace(shape=shape), slot.transposed)
    size = (tensor.end - tensor.start) // THIRDS
    start = tensor.start + slot.third * size
    return Piece(Tensor(tensor.code, shape, start, start + size), slot.transposed)
