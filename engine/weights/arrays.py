"""Arrays on their way between files and devices, on the host: their order of axes and their types.

Both are changed in tiles that stay in a core's cache. numpy by itself turns a matrix at 0.5 GB/s, since each
number that it writes comes from another line of memory, and widens float16 at 1.2, one number at a time.
"""

import itertools
import threading
from collections.abc import Iterator

import numpy as np

from engine.types import UserError

ALIGNMENT = 64  # bytes: what lies so JAX takes on CPUs without a copy
NUMBERS, COLUMNS = 2**16, 256  # of a tile, at most
# of float16 in float32: sign, and exponent and mantissa 13 bits to the left; behind a bias smaller by 112
HALF_BITS, HALF_BIAS = np.array(0x8FFFE000, np.uint32).view(np.int32), np.float32(2.0**112)
SMALLEST = np.array(1 << 13, np.int32).view(np.float32)[()]  # what float16's is before the bias
HALF_INFINITY = np.float32(2.0**16)  # what float16's becomes by the same steps; NaNs become more


def fresh_bytes(size: int) -> np.ndarray:
    """Memory to be filled, where JAX need not copy it."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size]


def fresh_like(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same for numbers of another type."""
    return fresh_bytes(array.size * dtype.itemsize).view(dtype).reshape(array.shape)


class Scratch(threading.local):
    """Memory of each thread that is used again: what is fresh, the system first fills with zeros."""

    def __init__(self) -> None:
        self.memory = fresh_bytes(0)

    def __call__(self, size: int) -> np.ndarray:
        """So many bytes, good until the thread's next call."""
        if self.memory.nbytes < size:
            self.memory = fresh_bytes(size)
        return self.memory[:size]

    def kept(self, array: np.ndarray) -> np.ndarray:
        """The array, or where it lies in this memory a copy of it."""
        if not np.may_share_memory(array, self.memory):
            return array
        copied = fresh_like(array, array.dtype)
        copied[...] = array
        return copied


def in_order(array: np.ndarray) -> np.ndarray:
    """The array with its last axis next in memory; itself, if it is so already."""
    return array if array.flags.c_contiguous else _changed(array, array.dtype)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` as `dtype` and in order, itself if it already is.

    Raises:
      UserError: with the name, where a finite number would become infinite.
    """
    if array.dtype == dtype:
        return in_order(array)
    result = _changed(array, dtype)
    if dtype == np.float16 and not np.isfinite(result).all() and np.isfinite(array).all():
        raise UserError(f"{name} has values beyond float16's 65504: use bfloat16 or float32")
    return result


def _changed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    result = fresh_like(array, dtype)
    half = array.dtype == np.float16 and dtype != np.float16
    source, target = (array.reshape(-1), result.reshape(-1)) if array.flags.c_contiguous else (array, result)
    with np.errstate(over="ignore", invalid="ignore"):
        for tile in _tiles(source):
            part = source[tile]
            if half:
                part = _from_half(part)
            elif part.dtype != dtype:  # numpy is slow where it changes axes and types at once
                part = np.ascontiguousarray(part).astype(dtype)
            target[tile] = part
    return result


def _tiles(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Parts that make up an array: long in its last axis, and in the one whose numbers lie side by side."""
    axes = range(array.ndim)
    nearest = min(axes, key=lambda axis: (abs(array.strides[axis]), -axis))
    sides, left = {}, NUMBERS
    for axis in (axes[-1], nearest, *sorted(axes, key=lambda axis: array.shape[axis])):  # short ones whole
        if axis not in sides:
            most = COLUMNS if array.ndim > 1 and axis in (axes[-1], nearest) else left
            sides[axis] = max(1, min(array.shape[axis], most, left))
            left //= sides[axis]
    steps = [range(0, array.shape[axis], sides[axis]) for axis in axes]
    for corner in itertools.product(*steps):
        yield tuple(slice(first, first + sides[axis]) for axis, first in enumerate(corner))


def _from_half(part: np.ndarray) -> np.ndarray:
    """float16 as float32, which is exact."""
    wide = np.empty(part.shape, np.float32)
    if SMALLEST * HALF_BIAS:  # or some library has told this thread's CPU that such numbers are zeros
        bits = wide.view(np.int32)
        bits[...] = part.view(np.int16)
        bits <<= 13
        bits &= HALF_BITS
        wide *= HALF_BIAS
        if wide.max() < HALF_INFINITY and wide.min() > -HALF_INFINITY:
            return wide
    wide[...] = part
    return wide
