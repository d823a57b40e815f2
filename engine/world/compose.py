"""Draws layouts on the device: one program for all scenes, from a table of sprites and one of backgrounds.

Texels are packed four bytes to a word, so that a look-up is one gather; both tables hold levels of half the
size each (mipmaps), so that small sprites do not flicker and distant blur costs nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from engine.world import backgrounds, light, styles
from engine.world.atlas import SIDE, Atlas
from engine.world.layout import Layout
from engine.world.scene import BACKGROUNDS, COLOURS, MOST, STYLES

LEVELS = 4  # of both tables: the whole size, a half, a quarter, an eighth
GROUND = 144  # pixels of a background, of which at least 1 - ZOOM is seen
ZOOM = 0.12
VARIANTS = 8  # painted versions of each background; mirrored, shifted, and in more or less light
PHOTO = STYLES.index("photo")
WHITE = 1 + COLOURS.index("white")  # as a layout's tint

PALETTE = {
    "red": (0.88, 0.10, 0.12),
    "orange": (0.98, 0.50, 0.06),
    "yellow": (0.99, 0.85, 0.10),
    "green": (0.15, 0.66, 0.20),
    "blue": (0.12, 0.36, 0.92),
    "purple": (0.54, 0.18, 0.76),
    "pink": (1.00, 0.50, 0.74),
    "brown": (0.46, 0.27, 0.13),
    "black": (0.13, 0.13, 0.15),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.55, 0.56, 0.58),
}


class Textures(NamedTuple):
    """What `compose` draws from; about 12 MB of sprites for 250 things, 19 MB of backgrounds.

    Attributes:
      sprites, grounds: packed RGBA of all levels, the largest first, sprite by sprite.
      body: for each sprite the lightness, 0..1, of most of it: painted over, this becomes the paint's.
      hue: the direction of most of its colour, see `opponents`; (0, 0) for a grey thing.
      keep: how far its grey parts, its white parts and those of other hues stay as they are when it is
        painted, 0..1: only where there is little of them.
    """

    sprites: UInt32[Array, " P"]
    grounds: UInt32[Array, " Q"]
    body: Float[Array, " N"]
    hue: Float[Array, "N 2"]
    keep: Float[Array, "N 3"]


def textures(atlas: Atlas, variants: int = VARIANTS) -> Textures:
    """The tables on the device. Paints the backgrounds: some seconds on the host.

    Args:
      variants: painted versions of each background.
    """
    grounds = backgrounds.table(variants, GROUND).reshape(-1, GROUND, GROUND, 4)
    masks = grounds[..., 3:]
    # High and low bits cannot be averaged in one byte: each level packs them anew.
    layers = np.concatenate([grounds[..., :3], masks & 0xF0, masks << 4], -1)
    levels = [
        np.concatenate([level[..., :3], level[..., 3:4] & 0xF0 | level[..., 4:] >> 4], -1)
        for level in _levels(layers)
    ]
    tables = _packed(_levels(atlas.pixels)), _packed(levels), *_paintable(atlas.pixels)
    return Textures(*map(jnp.asarray, tables))


def _levels(pixels: UInt8[np.ndarray, "N S S C"]) -> list[np.ndarray]:
    levels = [pixels]
    for _ in range(LEVELS - 1):
        n, side, _, channels = levels[-1].shape
        quads = levels[-1].reshape(n, side // 2, 2, side // 2, 2, channels)
        levels.append(np.uint8(quads.mean((2, 4), dtype=np.float32) + 0.5))
    return levels


def _packed(levels: list[np.ndarray]) -> UInt32[np.ndarray, " P"]:
    return np.concatenate([np.ascontiguousarray(level).view("<u4").ravel() for level in levels])


def _paintable(pixels: UInt8[np.ndarray, "N S S 4"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`body`, `hue` and `keep` of Textures."""
    found = [_body(sprite[sprite[..., 3] > 200][:, :3].astype(np.float32) / 255) for sprite in pixels]
    return tuple(np.array(part, np.float32) for part in zip(*found, strict=True))


def _body(solid: Float[np.ndarray, "M 3"]) -> tuple[float, np.ndarray, list[float]]:
    """Lightness and hue of most of a sprite's opaque pixels; and what is so little of it that it may stay."""
    lightness = solid @ np.array([0.3, 0.59, 0.11], np.float32)
    chroma = np.stack(opponents(solid.T), -1)
    strong = np.hypot(*chroma.T) > 0.15
    hue = chroma[strong].sum(0) if strong.any() else np.zeros(2, np.float32)
    hue = hue / max(float(np.hypot(*hue)), 1e-6)
    white = ~strong & (lightness > 0.8)
    foreign = strong & (chroma @ hue < 0.3 * np.hypot(*chroma.T))
    shares = np.array([(~strong).mean(), white.mean(), foreign.mean()])
    keep = np.clip((np.array([0.4, 0.4, 0.25]) - shares) / 0.1, 0, 1)
    mine = ~((white & (keep[1] > 0)) | (foreign & (keep[2] > 0)))
    rest = lightness[mine]
    # Outlines and pupils are no body: the median is of what is not nearly black.
    bright = rest[rest > 0.25] if (rest > 0.25).mean() > 0.4 else rest
    return float(np.clip(np.median(bright), 0.15, 0.95)), hue, list(keep)


def opponents(colour):
    """The two colour differences, red against cyan and green against magenta-blue, of (3, ...) planes."""
    red, green, blue = colour
    return red - 0.5 * (green + blue), 0.866 * (green - blue)


def compose(tables: Textures, layouts: Layout, size: int) -> UInt8[Array, "B S S 3"]:
    """The pictures of a batch of layouts (each array with a leading axis).

    Args:
      size: pixels a side; a multiple of 32. One program for each size and batch, whatever the scenes.

    Raises:
      ValueError: a size that pixel art cannot be drawn in.
    """
    return _compose(tables, layouts, size)


@functools.partial(jax.jit, static_argnames="size")
def _compose(tables: Textures, layouts: Layout, size: int) -> UInt8[Array, "B S S 3"]:
    at = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    x, y = jnp.meshgrid(at, at)
    picture = _ground(tables, layouts, x, y)
    picture = _shadows(picture, layouts, x, y)
    picture, cover = _things(tables, layouts, picture, x, y)
    picture = light.rain(picture, layouts.time, layouts.chance, x, y)
    picture = styles.restyle(picture, cover, layouts.style, layouts.chance)
    return jnp.moveaxis(jnp.clip(picture * 255 + 0.5, 0, 255).astype(jnp.uint8), 0, -1)


def _taps(
    texels: UInt32[Array, " P"],
    start: Int[Array, "B 1 1"],
    side: Int[Array, "B 1 1"],
    u: Float[Array, "B S S"],
    v: Float[Array, "B S S"],
    clamp: bool,
) -> list[tuple[Float[Array, "B S S"], UInt32[Array, "B S S"]]]:
    """The four texels around each point, with their weights; u and v in 0..1 of the square at `start`.

    Outside of it, there is nothing (weight 0), or with `clamp` the nearest texel.
    """
    found = []
    u, v = u * side - 0.5, v * side - 0.5
    column, row = jnp.floor(u), jnp.floor(v)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - jnp.abs(u - column - dx)) * (1 - jnp.abs(v - row - dy))
            c, r = column.astype(jnp.int32) + dx, row.astype(jnp.int32) + dy
            inside = (c >= 0) & (c < side) & (r >= 0) & (r < side)
            index = start + jnp.clip(r, 0, side - 1) * side + jnp.clip(c, 0, side - 1)
            word = texels.at[index].get(mode="promise_in_bounds")
            found.append((weight if clamp else jnp.where(inside, weight, 0), word))
    # Else the compiler looks each texel up again for every channel that is read from it.
    return jax.lax.optimization_barrier(found)


def _byte(word: UInt32[Array, "B S S"], which: int) -> Float[Array, "B S S"]:
    return (word >> 8 * which & 0xFF).astype(jnp.float32)


def _square(index: Int[Array, " B"], level: Int[Array, " B"], number: int, side: int):
    """Where the packed square `index` of that level starts, and its side; both (B, 1, 1)."""
    starts = np.cumsum([0] + [number * (side >> k) ** 2 for k in range(LEVELS - 1)])
    sides = jnp.right_shift(side, level)
    start = jnp.asarray(starts, jnp.int32)[level] + index * sides * sides
    return start[:, None, None], sides[:, None, None]


def _ground(tables: Textures, layouts: Layout, x, y) -> Float[Array, "3 B S S"]:
    """The background at its time of day; out of focus in a photo."""
    size = x.shape[-1]
    chance = layouts.chance[..., None, None]
    number = tables.grounds.shape[0] // sum((GROUND >> k) ** 2 for k in range(LEVELS))
    variants = number // len(BACKGROUNDS)
    index = layouts.background * variants + layouts.variant % variants
    sharp = max(0, round(np.log2(GROUND / size)))
    blurred = min(LEVELS - 1, sharp + 2)
    level = jnp.where(layouts.style == PHOTO, blurred, sharp)
    seen = 1 - ZOOM * chance[:, 0]
    u, v = (1 - seen) * chance[:, 1] + seen * x, (1 - seen) * chance[:, 2] + seen * y
    u = jnp.where(layouts.flipped[:, None, None], 1 - u, u)
    taps = _taps(tables.grounds, *_square(index, level, number, GROUND), u, v, clamp=True)
    colours = jnp.stack([sum(w * _byte(t, i) for w, t in taps) for i in range(3)]) / 255
    # A level's texels are seen as squares when it is magnified: smoothed.
    is_photo = (layouts.style == PHOTO)[:, None, None]
    colours = jnp.where(is_photo, styles.blur(colours, 1.5), colours)
    sky, lit = (sum(w * (t >> shift & 15).astype(jnp.float32) for w, t in taps) / 15 for shift in (28, 24))
    warmth = jnp.array([0.5, 0.0, -0.5])[:, None, None, None] * (chance[:, 4] - 0.5) * 0.08
    colours = jnp.clip(colours * (0.94 + 0.1 * chance[:, 3] + warmth), 0, 1)
    return light.grade(colours, sky, lit, layouts.time, layouts.chance, x, y)


def _shadows(picture: Float[Array, "3 B S S"], layouts: Layout, x, y) -> Float[Array, "3 B S S"]:
    """In a photo, a soft shadow on the ground under each thing that stands there."""
    for k in range(MOST):
        across, down, half, strength = (layouts.shadow[:, k, i, None, None] for i in range(4))
        half = jnp.maximum(half, 1e-3)
        distance = jnp.hypot((x - across - 0.15 * half) / half, (y - down) / (0.26 * half))
        shade = 0.62 * strength * jnp.clip(1.25 - distance, 0, 1) * (layouts.style == PHOTO)[:, None, None]
        picture = picture * (1 - shade)
    return picture


def _things(
    tables: Textures, layouts: Layout, picture: Float[Array, "3 B S S"], x, y
) -> tuple[Float[Array, "3 B S S"], Float[Array, "B S S"]]:
    """The sprites over the picture; and how much of each pixel they cover."""
    cover = jnp.zeros_like(picture[0])
    daylight = light.things_light(layouts.time)[..., None, None]
    is_photo = (layouts.style == PHOTO)[:, None, None]
    for k in range(MOST):
        u, v = _within(layouts, k, x, y)
        shrink = SIDE / (layouts.side[:, k] * x.shape[-1])
        level = jnp.clip(jnp.floor(jnp.log2(shrink) + 0.5), 0, LEVELS - 1).astype(jnp.int32)
        square = _square(layouts.sprite[:, k], level, tables.body.shape[0], SIDE)
        mirrored = jnp.where(layouts.mirrored[:, k, None, None], 1 - u, u)
        taps = _taps(tables.sprites, *square, mirrored, v, clamp=False)
        red, green, blue, alpha = (sum(w * _byte(t, i) for w, t in taps) / 255 for i in range(4))
        alpha = alpha * (layouts.thing[:, k, None, None] >= 0)
        colour = jnp.stack([red, green, blue]) / jnp.maximum(alpha, 1 / 255)
        colour, alpha = jax.lax.optimization_barrier((colour, alpha))
        own = (table[layouts.sprite[:, k]] for table in (tables.body, tables.hue, tables.keep))
        colour = painted(jnp.clip(colour, 0, 1), layouts.tint[:, k], *own)
        # Light from the upper left gives a photo's things a round body; white paint is flat without.
        shaded = 1.13 - 0.85 * (jnp.square(u - 0.36) + jnp.square(v - 0.3))
        shaded = jnp.where(is_photo, jnp.maximum(shaded, 0.45), 1)
        is_white = (layouts.tint[:, k] == WHITE)[:, None, None]
        shaded = jnp.where(
            is_white & ~is_photo, 1.02 - 0.3 * (jnp.square(u - 0.4) + jnp.square(v - 0.3)), shaded
        )
        colour = colour * daylight * shaded
        picture = picture + alpha * (colour - picture)
        cover = cover + alpha * (1 - cover)
    return picture, cover


def _within(layouts: Layout, k: int, x, y) -> tuple[Float[Array, "B S S"], Float[Array, "B S S"]]:
    """Each pixel as (u, v) in the cell of sprite k, 0..1 inside, as if it were not mirrored."""
    side, angle = layouts.side[:, k, None, None], layouts.angle[:, k, None, None]
    dx, dy = x - layouts.centre[:, k, 0, None, None], y - layouts.centre[:, k, 1, None, None]
    cos, sin = jnp.cos(angle) / side, jnp.sin(angle) / side
    return 0.5 + cos * dx - sin * dy, 0.5 + sin * dx + cos * dy


def painted(
    colour: Float[Array, "3 B S S"],
    tint: Int[Array, " B"],
    body: Float[Array, " B"],
    hue: Float[Array, "B 2"],
    keep: Float[Array, "B 3"],
) -> Float[Array, "3 B S S"]:
    """The colours in paint `tint` (0: none, else 1 + index in COLOURS), with their light and dark.

    What is as light as the body becomes the paint; darker parts go to black and lighter ones towards
    white, so that outlines, pupils and highlights stay. Details stay as they are as far as `keep` says:
    tyres, teeth and eyes, an apple's leaf.
    """
    paints = jnp.array([(0.0, 0.0, 0.0)] + [PALETTE[name] for name in COLOURS], jnp.float32)
    paint = paints[tint].T[..., None, None]
    keep, hue = keep.T[..., None, None], hue.T[..., None, None]
    lightness = styles.grey(colour)
    t = lightness / body[:, None, None]
    above = jnp.clip((t - 1) / jnp.maximum(1 / body - 1, 0.15)[:, None, None], 0, 1)
    t = jnp.clip(t, 0, 1)
    # White paint has only its shadows to show a shape by; the others keep some of their light there.
    is_white = (tint == WHITE)[:, None, None]
    shade = t * jnp.where(is_white, jnp.sqrt(t), 1.15 - 0.15 * t)
    ramp = paint * shade + 0.6 * above * (1 - paint)
    first, second = opponents(colour)
    chroma = jnp.sqrt(first * first + second * second)  # jnp.hypot costs thrice as much
    grey = 1 - jnp.clip((chroma - 0.08) / 0.12, 0, 1)
    along = (first * hue[0] + second * hue[1]) / jnp.maximum(chroma, 0.01)
    stays = jnp.maximum(
        grey * jnp.maximum(keep[0], keep[1] * jnp.clip((lightness - 0.72) / 0.14, 0, 1)),
        (1 - grey) * keep[2] * jnp.clip((0.45 - along) / 0.3, 0, 1),
    )
    return jnp.where(tint[:, None, None] > 0, ramp + 0.88 * stays * (colour - ramp), colour)
