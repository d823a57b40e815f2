"""Batches of the drawn world: scenes told on the host, drawn on the device."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
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


class Told(NamedTuple):
    """Scenes that are settled to the last number, and not drawn yet."""

    captions: list[str]
    scenes: list[Scene]
    layouts: Layout


@functools.cache
def sprites() -> atlas.Atlas:
    """UserError where the atlas cannot be read."""
    return atlas.load(THINGS)


@functools.cache
def tables() -> Textures:
    """What `compose` draws from. UserError where the atlas cannot be read."""
    return textures(sprites())


def laid_out(seed: int, first_index: int, n: int, easy: float = 0.0, held_out: bool = False) -> Told:
    """What `batch` draws, told on the host alone."""
    told = (tell(seed, first_index + i, easy, held_out) for i in range(n))
    captions, scenes, rngs = zip(*told, strict=True)
    return Told(list(captions), list(scenes), layouts(scenes, sprites(), rngs))


def composed(where: Layout, size: int) -> UInt8[jax.Array, "N S S 3"]:
    """The pictures, on the device; does not wait for them. UserError for a size that they cannot have."""
    if size % MULTIPLE:
        raise UserError(f"size={size}: the world is drawn in multiples of {MULTIPLE} pixels")
    return compose(tables(), where, size)


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
    told = laid_out(seed, first_index, n, easy, held_out)
    return np.asarray(composed(told.layouts, size)), told.captions, told.scenes


def draw(
    scenes: Sequence[Scene], rngs: Sequence[np.random.Generator], size: int
) -> tuple[UInt8[np.ndarray, "N S S 3"], Layout]:
    """Pictures of scenes, and where everything is in them; what a scene leaves open comes from its generator.

    Raises:
      UserError: as `batch`.
    """
    where = layouts(scenes, sprites(), rngs)
    return np.asarray(composed(where, size)), where
