"""Single safetensors files, read and written one tensor at a time, so that no file is in memory whole.

The format (github.com/huggingface/safetensors): eight bytes with the header's length, little-endian; the
header, a JSON object of name -> {dtype, shape, data_offsets}; then the tensors' bytes, row-major. The
library checks the header on reading. The bytes are read by their offsets and not through the library's
memory map, whose pages would count against the process until the file is closed.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from engine.types import UserError
from engine.weights import arrays

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
# Numbers that some programs store beside the weights.
NUMBERS = DTYPES | {code: np.dtype(name) for code, name in (("I32", "<i4"), ("I64", "<i8"), ("F64", "<f8"))}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """What a header says of one tensor. start, end: its bytes, counted from the beginning of the file."""

    code: str  # "F32", "BF16", "I64", ...
    shape: tuple[int, ...]
    start: int
    end: int


def as_dtype(dtype: DTypeLike) -> np.dtype:
    """The numpy dtype of a name or a JAX type; UserError for all but float32, float16, bfloat16."""
    try:
        known = np.dtype(dtype)
    except TypeError:
        known = None
    if known not in CODES:
        raise UserError(f"weights cannot be {dtype}: write float32, float16 or bfloat16")
    return known


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, in the order of the bytes. Raises UserError, with the file, where it is broken."""
    header, data = _read_header(path)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (data + offset for offset in entry["data_offsets"])
            tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), start, end)
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def read_metadata(path: Path) -> dict[str, str]:
    """What the writer noted beside the tensors. Raises UserError as `read_header`."""
    return _read_header(path)[0].get("__metadata__") or {}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of a checked header, and where the tensors' bytes begin."""
    try:
        with safe_open(path, "numpy"), open(path, "rb") as file:  # safe_open checks everything used below
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(length)), 8 + length
    except SafetensorError as error:
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull") from None
        raise UserError(
            f"{path} is broken, or a download that stopped early ({error}): fetch it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read_tensor(
    file: BinaryIO, name: str, tensor: Tensor, memory: Callable[[int], np.ndarray] = arrays.fresh_bytes
) -> np.ndarray:
    """One tensor of an open file, in `memory` of so many bytes; without it, in memory of its own."""
    file.seek(tensor.start)
    data = memory(tensor.end - tensor.start)
    if file.readinto(data) != data.nbytes:
        raise UserError(f"{file.name} became shorter while it was read: {name} is not whole")
    return data.view(NUMBERS[tensor.code]).reshape(tensor.shape)


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes one file, and waits until it is on the disk.

    Args:
      shapes, dtypes: of each name.
      tensor: name -> array of that shape and dtype; called once for each, as it is written.
      metadata: notes beside the tensors.
    """
    # The order of the library, which puts the widest types first to keep every tensor aligned.
    order = sorted(shapes, key=lambda name: (-dtypes[name].itemsize, CODES[dtypes[name]], name))
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name in order:
        shape, dtype = shapes[name], dtypes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = tensor(name)
            if array.shape != tuple(shapes[name]) or array.dtype != dtypes[name]:
                raise ValueError(f"{name} is {array.dtype}{array.shape}, not {dtypes[name]}{shapes[name]}")
            file.write(arrays.in_order(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
