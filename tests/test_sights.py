"""What ControlNets are shown: known answers, the same from numpy and from JAX."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from engine import sights
from engine.config import SIGHTS


def step(height=32, width=48, at=20) -> np.ndarray:
    """Black, and white from a column on."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, at:] = 255
    return image


def photo(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


@pytest.mark.parametrize("kind", ["", *SIGHTS])
def test_numpy_and_jax_agree(kind):
    images = photo(2, 33, 48)
    here, there = sights.seen(kind, images), sights.seen(kind, jnp.asarray(images))
    assert here.dtype == there.dtype == np.uint8 and here.shape == there.shape == images.shape
    assert np.abs(here.astype(int) - np.asarray(there)).max() <= 1
    assert np.array_equal(sights.seen(kind, images[1]), here[1])  # one picture, or many


def test_edges_are_where_it_is_steep():
    found = sights.seen("edges", step())
    assert (found[:, 19:21] == 255).all()
    assert (found[:, :17] == 0).all() and (found[:, 23:] == 0).all()
    assert np.array_equal(found.transpose(1, 0, 2), sights.seen("edges", step().transpose(1, 0, 2)))
    faint = step() // 32  # no edge: steps of 7 of 255
    assert (sights.seen("edges", faint) == 0).all()
    assert (sights.seen("edges", np.full((9, 9, 3), 77, np.uint8)) == 0).all()


def test_grey_is_that_of_pillow():
    image = photo(16, 24)
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(int)
    found = sights.seen("grey", image)
    assert (found[..., :1] == found).all() and np.abs(found[..., 0] - grey).max() <= 1


def test_a_mosaic_has_the_means_of_its_cells():
    image = photo(32, 64)
    means = image.reshape(16, 2, 32, 2, 3).astype(float).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    assert np.abs(sights.seen("mosaic", image) - means).max() <= 0.51
    odd = sights.seen("mosaic", photo(33, 50))
    assert len(np.unique(odd.reshape(-1, 3), axis=0)) <= 16 * 24
    large = sights.seen("mosaic", photo(1024, 1024))  # in no time: products of two at a time
    assert len(np.unique(large.reshape(-1, 3), axis=0)) <= 256
    small = photo(5, 7)
    assert np.array_equal(sights.seen("mosaic", small), small)  # a cell is a pixel at least
