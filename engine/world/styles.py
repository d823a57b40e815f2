"""Ways to draw, in JAX: the same picture in watercolour, as a pencil sketch, pixel art, in neon, as a photo.

Pictures are planes, channels first: (3, B, S, S), 0..1. Every style is computed for every picture and one
is kept: the program is one, and no picture waits for another's branch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engine.world.light import hashed
from engine.world.scene import STYLES

Planes = Float[Array, "3 B S S"]
Plane = Float[Array, "B S S"]
BLOCKS = 32  # pixel art's squares across the picture


def restyle(picture: Planes, cover: Plane, style: Int[Array, " B"], chance: Float[Array, "B 8"]) -> Planes:
    """The picture in its style; `cover` is where things are, 0..1. 'plain' leaves it as it is."""
    # The barriers keep the compiler from computing these anew for each channel that needs them.
    grain = jax.lax.optimization_barrier(_grain(picture.shape[-1], chance))
    styled = {
        "watercolour": watercolour(picture, grain),
        "pencil sketch": pencil(picture, cover, grain),
        "pixel art": pixels(picture),
        "neon": neon(picture, cover),
        "photo": photo(picture, grain),
    }
    for name, planes in styled.items():
        picture = jnp.where(style[:, None, None] == STYLES.index(name), planes, picture)
    return picture


def _grain(size: int, chance: Float[Array, "B 8"]) -> Plane:
    """Independent noise for each pixel, 0..1."""
    at = jnp.arange(size, dtype=jnp.int32)
    return hashed(at, at[:, None], (chance[:, 7, None, None] * 65536).astype(jnp.int32))


def blur(planes: Float[Array, "*N S S"], sigma: float) -> Float[Array, "*N S S"]:
    """Gaussian, `sigma` in pixels of a picture of 128; as two products with a banded matrix."""
    size = planes.shape[-1]
    at = np.arange(size)
    weights = np.exp(-0.5 * ((at - at[:, None]) / (sigma * size / 128)) ** 2)
    matrix = jnp.asarray(weights / weights.sum(1, keepdims=True), jnp.float32)
    return jnp.einsum("ij,...jk,lk->...il", matrix, planes, matrix)


def slopes(planes: Float[Array, "*N S S"]) -> Float[Array, "*N S S"]:
    """How steep the planes are, a pixel of 128 long; 0 at the far edges."""
    down = jnp.diff(planes, axis=-2, append=planes[..., -1:, :])
    across = jnp.diff(planes, axis=-1, append=planes[..., -1:])
    return jnp.sqrt(down * down + across * across) * (planes.shape[-1] / 128)


def grey(picture: Planes) -> Plane:
    return 0.3 * picture[0] + 0.59 * picture[1] + 0.11 * picture[2]


def saturated(picture: Planes, by: float) -> Planes:
    return jnp.clip(grey(picture) + by * (picture - grey(picture)), 0, 1)


def watercolour(picture: Planes, grain: Plane) -> Planes:
    """Pale washes that pool at their edges, on paper whose white shows around and between."""
    soft = blur(picture, 1.0)
    pools = jax.lax.optimization_barrier(jnp.clip(3.0 * slopes(soft).max(0) - 0.1, 0, 0.5))
    size = picture.shape[-1]
    blotches = size / 8 * (blur(grain, 5.0) - 0.5)  # about -1..1 at any size
    wash = jnp.clip(0.74 + 0.13 * blotches, 0.5, 1) * (1 - saturated(soft, 1.35))
    at = (jnp.arange(size) + 0.5) / size
    aside = jnp.minimum(at, 1 - at)
    margin = jnp.clip((jnp.minimum(aside, aside[:, None]) - 0.045 - 0.03 * blotches) / 0.02, 0, 1)
    paper = 0.985 - 0.12 * jnp.abs(blur(grain, 0.7) - 0.5)
    return paper - margin * wash * (1 - pools) - margin * 0.45 * pools


def pencil(picture: Planes, cover: Plane, grain: Plane) -> Planes:
    """Graphite on paper: outlines, and hatching where it is dark; things keep a trace of their colour."""
    size = picture.shape[-1]
    light = grey(picture)
    thing = 0.4 + 0.6 * cover  # what is behind is drawn with a lighter hand
    lines = jnp.clip(4.0 * slopes(blur(light, 0.6)) - 0.12, 0, 0.85) * thing
    at = jnp.arange(size, dtype=jnp.float32) * (128 / size)
    period = 6.0 if size >= 128 else 10.0  # finer strokes than two pixels are grey
    waves = [0.5 + 0.5 * jnp.cos(2 * jnp.pi / period * (at + s * at[:, None])) for s in (1, -0.8)]
    dark = 1 - light
    tone = (
        jnp.clip(1.3 * dark - 0.2, 0, 1) * 0.55 * waves[0] + jnp.clip(2 * dark - 1.1, 0, 1) * 0.4 * waves[1]
    )
    ink = jnp.clip(jnp.maximum(lines, tone + 0.12 * dark) * (0.75 + 0.5 * grain), 0, 0.92)
    hue = picture / jnp.maximum(picture.max(0), 0.2)
    tint = 1 - (0.12 + 0.6 * cover) * (1 - hue) * (1 - 0.5 * ink)
    return jnp.array([0.965, 0.95, 0.92])[:, None, None, None] * (1 - ink) * tint


def pixels(picture: Planes) -> Planes:
    """Large squares of few strong colours."""
    size = picture.shape[-1]
    if size % BLOCKS:
        raise ValueError(f"a picture of {size} pixels cannot be drawn in {BLOCKS} squares a side")
    side = size // BLOCKS
    blocks = picture.reshape(*picture.shape[:2], BLOCKS, side, BLOCKS, side).mean((3, 5))
    few = jnp.round(saturated(1.08 * (blocks - 0.5) + 0.5, 1.25) * 5) / 5
    return few.repeat(side, -1).repeat(side, -2)


def neon(picture: Planes, cover: Plane) -> Planes:
    """Glowing tubes in the dark along every outline, in the colour of what they surround."""
    soft = blur(picture, 0.7)
    edges = jax.lax.optimization_barrier(jnp.clip(3.2 * slopes(soft).max(0) - 0.16, 0, 1))
    vivid = saturated(soft / jnp.maximum(soft.max(0), 0.12), 1.6)
    tubes = edges * (0.45 + 0.75 * cover) * (0.08 + vivid)
    glow = blur(tubes, 3.5)
    night = jnp.array([0.015, 0.01, 0.05])[:, None, None, None]
    return night + tubes + 1.1 * glow + 0.24 * cover * vivid * soft.max(0)


def photo(picture: Planes, grain: Plane) -> Planes:
    """A lens's own marks: contrast, dark corners, a little noise. (Shadow and depth: see `compose`.)"""
    at = 2 * (jnp.arange(picture.shape[-1]) + 0.5) / picture.shape[-1] - 1
    corners = 1 - 0.24 * jnp.square(jnp.square(at) + jnp.square(at[:, None])) / 1.6
    curve = picture + 0.35 * picture * (1 - picture) * (2 * picture - 1)
    return curve * corners + 0.03 * (grain - 0.5)
