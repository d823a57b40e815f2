"""The noise of an image is a function of (seed, index, step)."""

import jax
import numpy as np
import pytest

from engine.diffusion.noise import fresh_seed, image_keys, initial_noise, step_noise
from engine.types import UserError

SHAPE = (4, 4, 2)


def bits(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**32 - 1])
def test_keys_are_jaxs_own(seed):
    key = jax.random.key(seed, impl="threefry2x32")
    np.testing.assert_array_equal(bits(image_keys(seed, [5])[0]), bits(jax.random.fold_in(key, 5)))


def test_seeds_of_64_bits_are_jaxs_own_in_64_bit_mode_and_need_no_such_mode():
    with jax.enable_x64(True):
        expected = bits(jax.random.fold_in(jax.random.key(2**40 + 5, impl="threefry2x32"), 3))
    np.testing.assert_array_equal(bits(image_keys(2**40 + 5, [3])[0]), expected)


def test_distinct_seeds_and_indices_give_distinct_keys():
    seeds = [0, 1, 5, 2**32, 2**32 + 5, 2**40 + 5, 2**63, 2**63 + 5, 2**64 - 1]
    keys = np.concatenate([bits(image_keys(seed, [0, 1, 2**32 - 1])) for seed in seeds])
    assert len(np.unique(keys, axis=0)) == 3 * len(seeds)


def test_noise_does_not_depend_on_the_batch():
    together = image_keys(3, range(6))
    alone = image_keys(3, [4])
    np.testing.assert_array_equal(initial_noise(together, SHAPE)[4], initial_noise(alone, SHAPE)[0])
    np.testing.assert_array_equal(step_noise(together, 2, SHAPE)[4], step_noise(alone, 2, SHAPE)[0])


def test_every_use_has_its_own_noise():
    keys = image_keys(3, [0])
    uses = [initial_noise(keys, SHAPE), *(step_noise(keys, step, SHAPE) for step in range(3))]
    correlation = np.corrcoef([np.ravel(use) for use in uses])
    assert np.abs(correlation - np.eye(4)).max() < 0.6
    traced = jax.jit(step_noise, static_argnums=2)(keys, 1, SHAPE)
    np.testing.assert_array_equal(traced, uses[2])


def test_noise_is_unit_normal():
    noise = np.asarray(initial_noise(image_keys(1, range(64)), (16, 16, 4)))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_out_of_range(seed, index):
    with pytest.raises(UserError, match="out of range; write 0 to"):
        image_keys(seed, [index])


def test_fresh_seeds_differ_and_are_seeds():
    seeds = {fresh_seed() for _ in range(8)}
    assert len(seeds) > 1
    assert image_keys(max(seeds), [0]).shape == (1,)
