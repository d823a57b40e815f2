"""Painted backgrounds: all there, each itself, and each time another."""

import numpy as np
import pytest

from engine.world.backgrounds import PAINTERS, paint
from engine.world.scene import BACKGROUNDS, OUTDOORS


def test_every_background_has_a_painter():
    assert tuple(PAINTERS) == BACKGROUNDS


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_a_background_repeats_and_its_variants_differ(name):
    first = paint(name, 32, 0)
    np.testing.assert_array_equal(first, paint(name, 32, 0))
    assert (first != paint(name, 32, 1)).any()
    sky = first[..., 3] >> 4
    assert (sky.max() > 4) == (name in OUTDOORS)  # what night and rain repaint


def test_windows_are_lit_in_the_city_alone():
    assert (paint("city", 64, 0)[..., 3] & 15).max() > 8 and (paint("street", 64, 0)[..., 3] & 15).max() > 8
    assert (paint("meadow", 64, 0)[..., 3] & 15).max() == 0


@pytest.mark.parametrize(
    ("name", "channel"), [("plain blue", 2), ("meadow", 1), ("underwater", 2), ("jungle", 1), ("desert", 0)]
)
def test_colours_are_the_place_s_own(name, channel):
    ground = paint(name, 32, 0)[20:, :, :3].mean((0, 1))
    assert ground.argmax() == channel
