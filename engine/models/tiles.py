"""Decoding of large pictures in overlapping tiles, whose memory is that of a tile.

What a decoder keeps of a picture grows with its area: of 2048 x 2048 pixels, many gigabytes. The tiles, their
overlap of a quarter and the way they are blended are those of `AutoencoderKL.tiled_decode` in PyTorch
diffusers, so that pictures are the same. Tiles of one shape share one program, which takes them one after
another; those at the right and the bottom may be smaller.
"""

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engine.types import UserError

PARTS = 4  # a tile begins three quarters of a tile after the one before


class Span(NamedTuple):
    """Where a tile lies along one side, in latents."""

    start: int
    size: int


def check_tile(tile: int, scale: int) -> None:
    """Raises UserError unless a tile of so many pixels (0: none) has quarters of whole latents."""
    unit = PARTS * scale
    if tile < 0 or tile % unit:
        good = max(round(tile / unit), 1) * unit
        raise UserError(
            f"tile={tile}: this model takes tiles of multiples of {unit} pixels; write {good}, or 0"
        )


def decode_in_tiles(
    decode: Callable[[Float[Array, "B h w C"]], Float[Array, "B H W O"]],
    z: Float[Array, "B h w C"],
    tile: int,
    scale: int,
) -> Float[Array, "B H W O"]:
    """`decode(z)`, in tiles where a side is longer than one.

    Args:
      decode: latents of any size to pixels, `scale` times as many along each side.
      tile: side of a tile in latents, a multiple of PARTS; 0: the picture is decoded whole.
    """
    _, h, w, _ = z.shape
    if not tile or max(h, w) <= tile:
        return decode(z)
    rows, columns = spans(h, tile), spans(w, tile)
    grid = jnp.concatenate(
        [
            jnp.concatenate([_decoded(decode, z, some, others, tile * scale) for others in _runs(columns)], 1)
            for some in _runs(rows)
        ],
        0,
    )
    step = (tile - tile // PARTS) * scale
    blended = blend(grid, _weights(rows, tile, scale), _weights(columns, tile, scale))[..., :step, :step, :]
    R, N, B, S, _, channels = blended.shape
    image = blended.transpose(2, 0, 3, 1, 4, 5).reshape(B, R * S, N * S, channels)
    return image[:, : h * scale, : w * scale]


def spans(length: int, tile: int) -> list[Span]:
    """The tiles along a side: all begin a step apart, and end at the latest where the picture ends."""
    return [Span(start, min(tile, length - start)) for start in range(0, length, tile - tile // PARTS)]


def _runs(line: list[Span]) -> list[list[Span]]:
    """Neighbours of one size together."""
    return [list(run) for _, run in groupby(line, key=lambda span: span.size)]


def _decoded(decode, z, rows: list[Span], columns: list[Span], side: int) -> Float[Array, "R N B T T O"]:
    """Tiles of one shape, decoded one after another, filled up to `side` x `side` pixels."""
    B, _, _, C = z.shape
    shape = (B, rows[0].size, columns[0].size, C)
    starts = jnp.array([(row.start, column.start) for row in rows for column in columns])
    tiles = jax.lax.map(lambda at: decode(jax.lax.dynamic_slice(z, (0, at[0], at[1], 0), shape)), starts)
    down, right = (side - n for n in tiles.shape[2:4])
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, down), (0, right), (0, 0)))
    return tiles.reshape(len(rows), len(columns), *tiles.shape[1:])


def _weights(line: list[Span], tile: int, scale: int) -> Float[Array, "R E"]:
    """The share of each tile in the pixels that it has in common with the one before: from 0 to 1."""
    extent = tile // PARTS * scale
    shared = np.array([min(extent, span.size * scale) for span in line])
    weights = np.minimum(np.arange(extent) / shared[:, None], 1.0)
    weights[0] = 1.0  # nothing is before it
    return jnp.asarray(weights, jnp.float32)


def blend(
    grid: Float[Array, "R N B T T O"], down: Float[Array, "R E"], across: Float[Array, "N E"]
) -> Float[Array, "R N B T T O"]:
    """Tiles whose tops and left sides go over into the tiles above and before them.

    diffusers changes one tile after another in place: first its top, by the bottom of the one above, whose
    left side has been changed already; then its left side, by the right side of the one before, whose top has
    been. A tile that has others below or beside it is never so small that its changes meet in what those take
    of it. So they take it from `beside` and `below`, where it is changed along one side alone.
    """
    down, across = down[:, None, None, :, None, None], across[None, :, None, None, :, None]
    below = _over(grid, grid, down, 0)
    beside = _over(grid, grid, across, 1)
    return _over(_over(grid, beside, down, 0), below, across, 1)


def _over(tiles: Array, neighbours: Array, weight: Array, axis: int) -> Array:
    """`tiles`, their first pixels blended with the last of the neighbour before; axis 0 or 1 of the grid."""
    pixels = axis + 3
    extent = weight.shape[pixels]
    first, rest = jnp.split(tiles, [extent], pixels)
    last = jax.lax.slice_in_dim(neighbours, -extent, None, axis=pixels)
    # the first tile of a line has none before it; its weight is 1
    before = jnp.concatenate(
        [jax.lax.slice_in_dim(first, 0, 1, axis=axis), jax.lax.slice_in_dim(last, 0, -1, axis=axis)], axis
    )
    return jnp.concatenate([(1 - weight) * before + weight * first, rest], pixels)
