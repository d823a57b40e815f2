"""Addressed randomness: the noise of an image depends on (seed, image index, step) and on nothing else.

Batch size, number of devices and number of hosts do not enter: every image has its own key, and every use
of the key folds in its own number (0 for the initial noise, step + 1 for the noise of a sampling step).
"""

import secrets
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from engine.types import Keys, UserError

FURTHER, LARGER = 2**31 - 1, 2**31 - 2  # no sampler has so many steps
IMPLEMENTATION = "threefry2x32"  # bit-identical however the batch is sharded; the faster rbg is not


def fresh_seed() -> int:
    """A seed from the operating system, 0 to 2**32 - 1: short enough to be written down and typed again."""
    return secrets.randbits(32)


def image_keys(seed: int | Sequence[int], indices: Sequence[int]) -> Keys:
    """One key an image: fold_in(key(seed), index).

    Args:
      seed: 0 to 2**64 - 1, of all images or one for each. Each gives its own keys, with JAX's 64-bit mode
        on or off.
      indices: numbers of the images in their run, 0 to 2**32 - 1.

    Raises:
      UserError: a seed or an index out of range.
    """
    seeds = [seed] * len(indices) if isinstance(seed, int) else seed
    if bad := [seed for seed in seeds if not 0 <= seed < 2**64]:
        raise UserError(f"seed={bad[0]} is out of range; write 0 to {2**64 - 1}")
    if bad := [index for index in indices if not 0 <= index < 2**32]:
        raise UserError(f"image index {bad[0]} is out of range; write 0 to {2**32 - 1}")
    # jax.random.key drops the seed's upper half in 32-bit mode; this is what it builds in 64-bit mode.
    words = np.array([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32).reshape(-1, 2)
    return _fold_in(words, np.asarray(indices, np.uint32))


@jax.jit
def _fold_in(words: UInt32[Array, "B 2"], indices: UInt32[Array, " B"]) -> Keys:
    keys = jax.random.wrap_key_data(words, impl=IMPLEMENTATION)
    return jax.vmap(jax.random.fold_in)(keys, indices)


def further_keys(keys: Keys) -> Keys:
    """Keys for noise of their own, for a second sampler on the way of the same images."""
    return jax.vmap(lambda key: jax.random.fold_in(key, FURTHER))(keys)


def larger_keys(keys: Keys) -> Keys:
    """Keys for noise of their own, with which the same images are drawn over at a larger size."""
    return jax.vmap(lambda key: jax.random.fold_in(key, LARGER))(keys)


def initial_noise(keys: Keys, shape: tuple[int, ...]) -> Float[Array, " B *shape"]:
    """Unit normal float32 noise that a sample starts from, one `shape` an image."""
    return _normal(keys, 0, shape)


def step_noise(keys: Keys, step: int | Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, " B *shape"]:
    """Unit normal float32 noise that sampling step `step` (0 is the first; may be traced) adds."""
    return _normal(keys, step + 1, shape)


def _normal(keys: Keys, use: int | Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, " B *shape"]:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, use), shape, jnp.float32))(keys)
