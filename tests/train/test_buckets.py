"""Shapes of about equal area, and an order that is a function of the step."""

import collections

import numpy as np
import pytest

from engine.errors import UserError
from engine.pixels import Crop, crop_box
from engine.train.buckets import Order, Shape, nearest_shape, shapes

BUCKETS = np.array([0] * 12 + [1] * 5 + [2] * 1 + [3] * 23)
BATCH = 4


def seen(order: Order, steps: range) -> list[list[tuple[int, int]]]:
    """The pictures of each step, with their rounds."""
    starts = [order.batch(step) for step in steps]
    return [[order.picture(bucket, start + i) for i in range(BATCH)] for bucket, start in starts]


@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.parametrize("size", [512, 1024])
def test_shapes_are_multiples_of_about_the_same_area(size, multiple):
    found = shapes(size, 9, multiple, 4.0)
    assert len(found) == 9 and Shape(size, size) in found
    for width, height in found:
        assert width % multiple == height % multiple == 0
        assert abs(width * height / size**2 - 1) < 0.1
        assert Shape(height, width) in found
    aspects = [width / height for width, height in found]
    assert aspects == sorted(aspects)
    assert aspects[0] > 1 / 4 * 0.9 and aspects[-1] < 4 * 1.1


def test_few_pixels_have_few_shapes():
    assert shapes(64, 9, 64, 1.2) == [Shape(64, 64)]
    assert shapes(40, 1, 64) == [Shape(40, 40)]
    with pytest.raises(UserError, match=r"write data\.multiple=8"):
        shapes(40, 3, 64)


def test_a_picture_goes_to_the_nearest_aspect_ratio():
    among = [Shape(32, 64), Shape(48, 48), Shape(64, 32)]
    assert [nearest_shape(*size, among) for size in [(1, 9), (7, 5), (5, 7), (3, 2), (900, 100)]] == [
        *(0, 1, 1, 2, 2),
    ]


@pytest.mark.parametrize("crop", [Crop(), Crop(0, 0), Crop(1, 1), Crop(0.3, 0.9)])
@pytest.mark.parametrize("size", [(100, 50), (37, 91), (64, 64), (1, 7)])
@pytest.mark.parametrize("new", [(64, 64), (96, 40), (8, 56)])
def test_what_is_cropped_has_the_aspect_ratio_of_the_shape_and_lies_inside(size, new, crop):
    left, top, right, bottom = crop_box(*size, *new, crop)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert (right - left) / (bottom - top) == pytest.approx(new[0] / new[1])
    assert right - left == pytest.approx(size[0]) or bottom - top == pytest.approx(size[1])


def test_a_batch_holds_one_bucket():
    order = Order(BUCKETS, BATCH, seed=3)
    for batch in seen(order, range(50)):
        assert len({BUCKETS[picture] for picture, _ in batch}) == 1


def test_every_picture_is_seen_once_in_each_round_of_its_bucket():
    """After 4 epochs nothing is left over in any bucket, since the batch size is 4."""
    order = Order(BUCKETS, BATCH, seed=3)
    steps = range(order.first_step(4))
    assert len(steps) == len(BUCKETS)
    counts = collections.Counter(pair for batch in seen(order, steps) for pair in batch)
    assert counts == {(picture, round): 1 for picture in range(len(BUCKETS)) for round in range(4)}


def test_any_stretch_shows_all_pictures_about_equally_often():
    order = Order(BUCKETS, BATCH, seed=0)
    for epochs in (1, 2, 3, 7):
        steps = range(order.first_step(epochs))
        counts = collections.Counter(picture for batch in seen(order, steps) for picture, _ in batch)
        assert all(
            epochs - 1 <= counts[picture] <= epochs for picture in range(len(BUCKETS)) if picture != 17
        )
        assert counts[17] <= epochs  # alone in its bucket: it comes as four at once


def test_order_follows_from_the_step():
    whole = seen(Order(BUCKETS, BATCH, seed=3), range(40))
    assert seen(Order(BUCKETS, BATCH, seed=3), range(17, 40)) == whole[17:]
    assert seen(Order(BUCKETS, BATCH, seed=3), range(39, -1, -1)) == whole[::-1]
    assert seen(Order(BUCKETS, BATCH, seed=4), range(40)) != whole


def test_epochs_are_shuffled_anew():
    order = Order(np.zeros(12, int), BATCH, seed=3)
    epochs = [seen(order, range(3 * e, 3 * e + 3)) for e in range(3)]
    pictures = [[picture for batch in epoch for picture, _ in batch] for epoch in epochs]
    assert all(sorted(each) == list(range(12)) for each in pictures)
    assert pictures[0] != pictures[1] != pictures[2] != pictures[0]
    mixed = [order.batch(step)[0] for order in [Order(BUCKETS, 1, seed=3)] for step in range(41)]
    assert mixed != sorted(mixed)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_fewer_pictures_than_a_batch(count):
    order = Order(np.zeros(count, int), BATCH, seed=0)
    pairs = [pair for batch in seen(order, range(3 * count)) for pair in batch]
    assert sorted(pairs) == sorted((picture, round) for picture in range(count) for round in range(12))
