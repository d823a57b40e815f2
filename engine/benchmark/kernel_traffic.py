"""What kernels move between the memory of a TPU and their own: the compiler only knows what they tell it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from engine.flops import jaxpr_of

LANES, ROW_BYTES = 128, 32  # arrays lie in tiles of 128 columns, and of as many rows as make 32 bytes of each


def traffic(function: Callable, *arguments: Any) -> tuple[int, int]:
    """Bytes that the kernels in a call move, and that they tell the compiler; a scan's body counts once.

    A kernel fetches a block of an input when the next one is another, and writes one of an output likewise;
    blocks come in whole tiles.

    Args:
      arguments: arrays or jax.ShapeDtypeStruct; nothing is computed with them.
    """
    moved = told = 0
    for equation in _kernels(jaxpr_of(function, *arguments)):
        grid = equation.params["grid_mapping"]
        moved += sum(_moved(block, grid.grid) for block in grid.block_mappings)
        if (estimate := equation.params["cost_estimate"]) is not None:
            told += estimate.bytes_accessed
    return moved, told


def _kernels(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            for inside in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inside, (core.ClosedJaxpr, core.Jaxpr)):
                    yield from _kernels(getattr(inside, "jaxpr", inside))


def _moved(block: Any, grid: tuple[int, ...]) -> int:
    """Bytes of one operand: those of a block, as often as its place changes on the way through the grid."""
    points = [axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, grid), indexing="ij")]
    index = core.jaxpr_as_fun(block.index_map_jaxpr)
    places = np.stack(np.broadcast_arrays(*jax.vmap(index)(*(p.astype(np.int32) for p in points))), -1)
    changes = 1 + int((places[1:] != places[:-1]).any(-1).sum())
    *outer, rows, columns = (getattr(size, "block_size", size) or 1 for size in block.block_shape)
    itemsize = block.array_aval.dtype.itemsize
    tile = ROW_BYTES // itemsize
    whole = math.prod(outer) * -(-rows // tile) * tile * -(-columns // LANES) * LANES
    return changes * whole * itemsize
