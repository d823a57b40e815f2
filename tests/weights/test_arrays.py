"""Arrays between files and devices: other orders of axes and other types of the same numbers."""

import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.types import UserError
from engine.weights.arrays import ALIGNMENT, COLUMNS, NUMBERS, Scratch, cast, fresh_bytes, in_order

BFLOAT16 = np.dtype(jnp.bfloat16)
EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)  # with both infinities and all NaNs
FINITE_HALVES = EVERY_HALF[np.isfinite(EVERY_HALF)]


def bits(array):
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize("halves", [EVERY_HALF, FINITE_HALVES], ids=["every", "finite"])
def test_each_float16_becomes_what_numpy_makes_of_it(halves, dtype):
    with np.errstate(invalid="ignore"):
        wanted = halves.astype(np.float32).astype(dtype)
    found = cast(halves, dtype, "conv")
    assert found.dtype == dtype
    numbers = ~np.isnan(halves)
    np.testing.assert_array_equal(bits(found)[numbers], bits(wanted)[numbers])
    assert np.isnan(found[~numbers].astype(np.float32)).all()


@pytest.mark.parametrize("size", [0, 1, NUMBERS - 1, NUMBERS, 2 * NUMBERS + 1])
def test_no_number_is_left_out_or_taken_twice(size):
    halves = np.random.default_rng(size).standard_normal(size).astype(np.float16)
    np.testing.assert_array_equal(cast(halves, np.dtype(np.float32), "conv"), halves.astype(np.float32))


def test_an_infinity_is_kept_in_its_part_alone():
    halves = np.ones(3 * NUMBERS, np.float16)
    halves[NUMBERS + 5] = np.inf
    found = cast(halves, np.dtype(np.float32), "conv")
    assert np.flatnonzero(found != 1).tolist() == [NUMBERS + 5] and found[NUMBERS + 5] == np.inf


SHAPES = [(3, 5), (0, 3), (4, 3, 2, 3), (300, 2 * COLUMNS + 3), (3, 3, 40, 300), (300, 40, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_axes_come_in_order(shape, dtype):
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    orders = [tuple(reversed(range(array.ndim))), *([(3, 2, 0, 1), (2, 3, 1, 0)] if array.ndim == 4 else [])]
    for order in orders:
        turned = array.transpose(order)
        for found in (in_order(turned), cast(turned, np.dtype(np.float32), "conv")):
            assert found.flags.c_contiguous
            np.testing.assert_array_equal(found.astype(np.float32), turned.astype(np.float32))


def test_numbers_that_do_not_lie_side_by_side():
    every_other = np.arange(3 * NUMBERS, dtype=np.float32)[::-2]
    np.testing.assert_array_equal(in_order(every_other), every_other.copy())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a switch of these CPUs")
def test_no_float16_is_lost_where_a_library_has_switched_off_small_numbers():
    """As -ffast-math does, and torch.set_flush_denormal."""
    torch = pytest.importorskip("torch")
    assert torch.set_flush_denormal(True)
    try:
        found = cast(FINITE_HALVES, np.dtype(np.float32), "conv")
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(bits(found), bits(FINITE_HALVES.astype(np.float32)))


def test_what_is_as_it_should_be_is_not_copied():
    array = np.ones((3, 5), np.float32)
    assert in_order(array) is array
    assert cast(array, array.dtype, "conv") is array


def test_jax_takes_it_without_a_copy_on_a_cpu():
    array = fresh_bytes(4000).view(np.float32)
    array[:] = 1
    assert array.ctypes.data % ALIGNMENT == 0
    assert np.shares_memory(np.asarray(jax.device_put(array, jax.devices("cpu")[0])), array)


def test_what_is_kept_of_memory_that_is_used_again():
    scratch = Scratch()
    first = scratch(100)
    first[:] = 1
    kept, other = scratch.kept(first[10:20]), np.ones(3)
    assert kept.ctypes.data % ALIGNMENT == 0
    assert scratch.kept(other) is other
    assert np.shares_memory(scratch(50), first)
    scratch(50)[:] = 2
    assert (kept == 1).all()


def test_float16_overflow_is_told_and_infinity_kept():
    with pytest.raises(UserError, match=r"conv has values beyond float16's 65504: use bfloat16 or float32"):
        cast(np.array([1e5], np.float32), np.dtype(np.float16), "conv")
    kept = cast(np.array([np.inf, 65504], np.float32), np.dtype(np.float16), "conv")
    np.testing.assert_array_equal(kept, [np.inf, 65504])
