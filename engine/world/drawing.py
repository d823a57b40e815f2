"""Batches of the grown world: scenes told on the host, drawn on the device."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from engine.errors import UserError
from engine.world import atlas
from engine.world.captions import tell
from engine.world.compose import Textures, compose, textures
from engine.world.layout import Layout, layouts
from engine.world.scene import Scene
from engine.world.things import THINGS

MULTIPLE = 32  # pixels, which pixel art needs


@functools.cache
def tools() -> tuple[atlas.Atlas, Textures]:
    """The sprites, and what `compose` draws from. UserError where the atlas cannot be read."""
    sprites = atlas.load(THINGS)
    return sprites, textures(sprites)


def batch(
    seed: int, first_index: int, n: int, size: int, easy: float = 0.0, held_out: bool = False
) -> tuple[UInt8[np.ndarray, "N S S 3"], list[str], list[Scene]]:
    """Pictures, captions and truths first_index .. first_index + n - 1 of `seed`.

    Args:
      size: pixels a side, a multiple of 32.
      easy, held_out: see `sampling.sample_scene`.

    Raises:
      UserError: another size, or the atlas cannot be read.
    """
    told = (tell(seed, first_index + i, easy, held_out) for i in range(n))
    captions, scenes, rngs = zip(*told, strict=True)
    return draw(scenes, rngs, size)[0], list(captions), list(scenes)


def draw(
    scenes: Sequence[Scene], rngs: Sequence[np.random.Generator], size: int
) -> tuple[UInt8[np.ndarray, "N S S 3"], Layout]:
    """Pictures of scenes, and where everything is in them; what a scene leaves open comes from its generator.

    Raises:
      UserError: as `batch`.
    """
    if size % MULTIPLE:
        raise UserError(f"size={size}: the grown world is drawn in multiples of {MULTIPLE} pixels")
    sprites, tables = tools()
    where = layouts(scenes, sprites, rngs)
    return np.asarray(compose(tables, where, size)), where
