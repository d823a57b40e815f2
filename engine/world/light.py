"""Times of day and weather: how sunset, night and rain repaint a background that was painted by day.

Pictures here are planes, channels first: (3, B, S, S), 0..1; x and y are (S, S) fractions of the picture.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from engine.world.scene import TIMES

# What lands on the ground, and what lands on things: these must keep their colours.
GROUND_LIGHT = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.70, 0.56),
    "night": (0.24, 0.30, 0.48),
    "rain": (0.7,) * 3,
}
THING_LIGHT = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.91, 0.82),
    "night": (0.82, 0.85, 0.95),
    "rain": (0.88,) * 3,
}
# Skies from the top of the picture down: (height, colour).
SKIES = {
    "sunset": [
        (0.0, (0.29, 0.16, 0.44)),
        (0.28, (0.72, 0.27, 0.44)),
        (0.5, (0.96, 0.48, 0.25)),
        (0.75, (1, 0.8, 0.4)),
    ],
    "night": [(0.0, (0.02, 0.03, 0.11)), (0.6, (0.08, 0.12, 0.32)), (1.0, (0.16, 0.21, 0.45))],
    "rain": [(0.0, (0.38, 0.42, 0.48)), (0.6, (0.62, 0.66, 0.70)), (1.0, (0.66, 0.70, 0.74))],
}
DAY, SUNSET, NIGHT, RAIN = range(len(TIMES))


def hashed(x: Int[Array, "..."], y: Int[Array, "..."], seed: Int[Array, "..."]) -> Float[Array, "..."]:
    """Noise, 0..1, without a state: the same for the same three numbers on every device."""
    h = x.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ y.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    h = _mixed(h ^ seed.astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D))
    return (h >> 8).astype(jnp.float32) / (1 << 24)


def _mixed(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    h = (h ^ h >> 16) * jnp.uint32(0x7FEB352D)
    h = (h ^ h >> 15) * jnp.uint32(0x846CA68B)
    return h ^ h >> 16


def things_light(time: Int[Array, " B"]) -> Float[Array, "3 B"]:
    """What the colours of things are multiplied by."""
    return jnp.array([THING_LIGHT[name] for name in TIMES], jnp.float32)[time].T


def grade(
    ground: Float[Array, "3 B S S"],
    sky: Float[Array, "B S S"],
    lit: Float[Array, "B S S"],
    time: Int[Array, " B"],
    chance: Float[Array, "B 8"],
    x: Float[Array, "S S"],
    y: Float[Array, "S S"],
) -> Float[Array, "3 B S S"]:
    """The background at that time: its sky painted over, the rest in that light, its windows lit."""
    at = time[:, None, None]
    grey = 0.6 * ground.mean(0) + 0.4 * ground
    land = jnp.where(at == RAIN, grey, ground)
    land *= jnp.array([GROUND_LIGHT[name] for name in TIMES], jnp.float32)[time].T[..., None, None]
    land += jnp.where(at == NIGHT, lit, 0) * (jnp.array([1.0, 0.85, 0.45])[:, None, None, None] - land)
    over = jnp.zeros_like(ground)
    for name in ("sunset", "night", "rain"):
        over = jnp.where(at == TIMES.index(name), _gradient(name, y)[:, None], over)
    over = over + jnp.where(at == SUNSET, _sun(over, chance, x, y), 0)
    over = over + jnp.where(at == NIGHT, _moon_and_stars(chance, x, y), 0)
    return jnp.where(at == DAY, ground, land + sky * (over - land))


def _gradient(name: str, y: Float[Array, "S S"]) -> Float[Array, "3 S 1"]:
    heights, colours = zip(*SKIES[name], strict=True)
    rows = [jnp.interp(y[:, 0], jnp.array(heights), jnp.array(c)) for c in zip(*colours, strict=True)]
    return jnp.stack(rows)[..., None]


def _away(chance, x, y, low: float, high: float, top: float, bottom: float) -> Float[Array, "B S S"]:
    """Distance to a point that chance puts between those bounds."""
    across, down = (chance[:, i, None, None] for i in (4, 5))
    return jnp.hypot(x - low - across * (high - low), y - top - down * (bottom - top))


def _sun(over, chance, x, y) -> Float[Array, "3 B S S"]:
    """What the low sun adds to its sky."""
    away = _away(chance, x, y, 0.12, 0.88, 0.24, 0.36)
    disc = jnp.clip((0.085 - away) / 0.015 + 0.5, 0, 1)
    share = jnp.maximum(disc, 0.65 * jnp.exp(-jnp.square(away / 0.2)))
    return share * (jnp.array([1.0, 0.93, 0.66])[:, None, None, None] - over)


def _moon_and_stars(chance, x, y) -> Float[Array, "1 B S S"]:
    """A crescent moon, and a star in about every third cell of a grid."""
    away = _away(chance, x, y, 0.12, 0.88, 0.1, 0.2)
    shade = _away(chance, x - 0.035, y + 0.015, 0.12, 0.88, 0.1, 0.2)
    moon = jnp.clip((0.07 - away) / 0.015 + 0.5, 0, 1) * jnp.clip((shade - 0.06) / 0.015 + 0.5, 0, 1)
    cells, seed = 13, (chance[:, 6, None, None] * 65536).astype(jnp.int32)
    column, row = (jnp.floor(axis * cells).astype(jnp.int32) for axis in (x, y))
    dx = x * cells - column - 0.2 - 0.6 * hashed(column, row, seed)
    dy = y * cells - row - 0.2 - 0.6 * hashed(column, row, seed + 1)
    bright = hashed(column, row, seed + 2)
    stars = jnp.clip(1.6 - jnp.hypot(dx, dy) / 0.09, 0, 1) * jnp.where(bright > 0.55, bright, 0)
    return jnp.maximum(0.9 * moon, jnp.where(away > 0.11, stars, 0))[None]


def rain(
    picture: Float[Array, "3 B S S"],
    time: Int[Array, " B"],
    chance: Float[Array, "B 8"],
    x: Float[Array, "S S"],
    y: Float[Array, "S S"],
) -> Float[Array, "3 B S S"]:
    """Slanting streaks over the whole picture, where it rains."""
    seed = (chance[:, 6, None, None] * 65536).astype(jnp.int32)
    across = (x + 0.22 * y) * 30 + chance[:, 4, None, None]
    column = jnp.floor(across).astype(jnp.int32)
    down = y * 4 + 8 * hashed(column, column, seed)
    drop = jnp.floor(down).astype(jnp.int32)
    thin = jnp.clip(1.35 - jnp.abs(across - column - 0.5) / 0.14, 0, 1)
    streak = thin * (down - drop < 0.5) * (hashed(column, drop, seed + 1) < 0.55)
    return picture + jnp.where(time[:, None, None] == RAIN, 0.5 * streak, 0) * (0.88 - picture)
