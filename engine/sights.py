"""What a ControlNet may be shown of a picture: its edges, its greys, or a mosaic of its colours.

The same functions in training, on the devices, and where pictures are read to draw with them, on the host:
they take arrays of numpy and of JAX alike. Others (depth, poses) come from models that are not here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

LUMA = np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG
# Slopes, of luma 0 to 1 a pixel: up to the first there is no edge, from the second on a full one.
FAINT, STRONG = 0.05, 0.25
CELLS = 16  # of a mosaic, along the shorter side

Pictures = UInt8[Any, "*B H W 3"]
Plane = Float[Any, "*B H W"]


def seen(kind: str, images: Pictures) -> Pictures:
    """The pictures as they are to be shown. kind: one of engine.config.SIGHTS; "": as they are."""
    if not kind:
        return images
    xp = jnp if isinstance(images, jax.Array) else np
    colours = images.astype(xp.float32)
    if kind == "mosaic":
        found = _mosaic(xp, colours)
    else:
        luma = colours @ LUMA
        found = xp.repeat((_edges(xp, luma) if kind == "edges" else luma)[..., None], 3, axis=-1)
    return xp.round(xp.clip(found, 0, 255)).astype(xp.uint8)


def _edges(xp: Any, luma: Plane) -> Plane:
    """How steep it is (Sobel & Feldman 1968), behind a little blur against noise; 0 to 255."""
    smooth = (1, 2, 1)
    luma = _along(xp, _along(xp, luma, -1, smooth), -2, smooth) / (16 * 255)
    across, down = (
        _along(xp, _along(xp, luma, axis, (-1, 0, 1)), other, smooth) / 8
        for axis, other in ((-1, -2), (-2, -1))
    )
    slope = xp.sqrt(across**2 + down**2)
    return 255 * xp.clip((slope - FAINT) / (STRONG - FAINT), 0, 1)


def _along(xp: Any, plane: Plane, axis: int, weights: tuple[int, int, int]) -> Plane:
    """The weighted sum of each place and its neighbours; beyond the border all is as at the border."""
    pads = [(0, 0)] * plane.ndim
    pads[axis] = (1, 1)
    wide, size = xp.moveaxis(xp.pad(plane, pads, mode="edge"), axis, 0), plane.shape[axis]
    parts = (w * wide[i : i + size] for i, w in enumerate(weights) if w)
    return xp.moveaxis(sum(parts), 0, axis)


def _mosaic(xp: Any, colours: Float[Any, "*B H W 3"]) -> Float[Any, "*B H W 3"]:
    height, width = colours.shape[-3:-1]
    cell = min(height, width) / CELLS
    rows, columns = (_cells(side, max(1, round(side / cell))) for side in (height, width))
    *batch, _ = shape = colours.shape[:-2]
    by_row = (rows @ colours.reshape(*shape, width * 3)).reshape(*batch, height, width, 3)
    return columns @ by_row


def _cells(side: int, count: int) -> Float[np.ndarray, "S S"]:
    """The matrix that gives each place along a side the mean of its cell."""
    cell = np.arange(side) * count // side
    same = (cell[:, None] == cell[None, :]).astype(np.float32)
    return same / same.sum(1, keepdims=True)
