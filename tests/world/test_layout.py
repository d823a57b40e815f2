"""Layouts: what a caption states is where it says, whatever the generator draws."""

import itertools

import numpy as np
import pytest

from engine.world.layout import Layout, layout, layouts
from engine.world.scene import BACKGROUNDS, COLOURS, PLACES, STYLES, TIMES
from tests.world.sprites import plain_atlas, scene

SEEDS = range(25)
SIZES = list(itertools.product(("small", "big"), repeat=2))


def boxes(found: Layout) -> dict[int, np.ndarray]:
    """For each sprite that is drawn, from the farthest: [left, top, right, bottom], and its thing."""
    half = found.side[:, None] * plain_atlas().extent[found.sprite] / 2
    box = np.concatenate([found.centre - half, found.centre + half], -1)
    return {k: box[k] for k in np.flatnonzero(found.thing >= 0)}


def pair(found: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of the scene's first and second thing."""
    order = list(found.thing)
    box = boxes(found)
    return box[order.index(0)], box[order.index(1)]


def drawn(seed: int, *things: str, **changes) -> Layout:
    return layout(scene(*things, **changes), plain_atlas(), np.random.default_rng(seed))


def middle(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_relations_are_what_they_say(seed, sizes):
    for things in (("ball", "pole"), ("bar", "head"), ("pole", "bar")):
        first, second = pair(drawn(seed, *things, relation="left of", sizes=sizes))
        assert first[2] + 0.05 < second[0]
        first, second = pair(drawn(seed, *things, relation="next to", sizes=sizes))
        gap = max(first[0], second[0]) - min(first[2], second[2])
        assert 0 < gap < 0.06
        first, second = pair(drawn(seed, *things, relation="above", sizes=sizes))
        assert first[3] + 0.03 < second[1] and abs(middle(first) - middle(second))[0] < 0.1
        first, second = pair(drawn(seed, *things, relation="under", sizes=sizes))
        assert middle(first)[1] > middle(second)[1] + 0.5 * (second[3] - middle(second)[1])
        assert 0 < second[3] - first[1] < 0.35 * (second[3] - second[1]) and first[3] > second[3]
        first, second = pair(drawn(seed, *things, relation="on", sizes=sizes))
        assert 0 < first[3] - second[1] < 0.1 and first[1] < second[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_next_to_is_in_either_order_and_left_of_in_one(seed):
    lefts = [pair(drawn(s, "ball", "pole", relation="next to")) for s in SEEDS]
    assert {bool(first[0] < second[0]) for first, second in lefts} == {True, False}


@pytest.mark.parametrize("carrier", ["bar", "pole"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_rider_sits_on_the_back_and_looks_ahead(seed, carrier):
    found = drawn(seed, "ball", carrier, relation="riding")
    rider, back = pair(found)
    assert back[0] < middle(rider)[0] < back[2]
    assert back[1] < rider[3] < middle(back)[1] + 0.05 and middle(rider)[1] < back[1]
    assert list(found.thing[:2]) == [0, 1]  # the carrier hides the rider's lower part
    assert found.mirrored[0] == found.mirrored[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_glasses_are_at_the_eyes_and_hats_on_the_head(seed):
    found = drawn(seed, "head", "glasses", relation="wearing")
    wearer, worn = pair(found)
    np.testing.assert_allclose(middle(worn), middle(wearer), atol=1e-6)  # there the eyes are
    assert 0.5 < (worn[2] - worn[0]) / (wearer[2] - wearer[0]) < 0.75
    assert list(found.thing[:2]) == [0, 1]  # over the wearer
    wearer, worn = pair(drawn(seed, "head", "hat", relation="wearing"))
    assert worn[1] < wearer[1] < worn[3] < middle(wearer)[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_held_is_at_the_hand_on_either_side(seed):
    found = drawn(seed, "head", "ball", relation="holding")
    holder, held = pair(found)
    wide, tall = holder[2:] - holder[:2]
    hand = holder[0] + wide * (0.9 if found.mirrored[0] else 0.1), holder[1] + 0.7 * tall
    assert held[0] < hand[0] < held[2] and held[1] < hand[1] < held[3]
    assert held[2] - held[0] < 0.6 * wide and list(found.thing[:2]) == [0, 1]


def test_who_cannot_is_refused():
    with pytest.raises(ValueError, match="no eyes"):
        drawn(0, "ball", "hat", relation="wearing")
    with pytest.raises(ValueError, match="no hand"):
        drawn(0, "pole", "ball", relation="holding")


@pytest.mark.parametrize("size", ["small", "big"])
@pytest.mark.parametrize("thing", ["ball", "bar", "pole"])
def test_what_is_counted_does_not_overlap(thing, size):
    for seed, count in itertools.product(SEEDS, (2, 3, 4)):
        box = list(boxes(drawn(seed, thing, count=count, sizes=(size,))).values())
        assert len(box) == count
        for a, b in itertools.combinations(box, 2):
            shared = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            assert min(shared) < 0.005


@pytest.mark.parametrize("size", ["small", "big"])
@pytest.mark.parametrize("place", PLACES)
def test_places_and_sizes_are_clear(place, size):
    for seed in SEEDS:
        (box,) = boxes(drawn(seed, "ball", place=place, sizes=(size,))).values()
        x, y = middle(box) - 0.5
        away = {"left": -x, "right": x, "top": -y, "bottom": y}
        if place == "middle":
            assert max(map(abs, (x, y))) < 0.08
        else:
            assert away.pop(place) > 0.14 and sum(v > 0.1 for v in away.values()) == 0
        assert (box[2] - box[0] > 0.45) == (size == "big")


@pytest.mark.parametrize("relation", ["left of", "above", "on", "under", "riding", "next to", "holding"])
def test_nothing_leaves_the_picture(relation):
    for seed, sizes in itertools.product(SEEDS, SIZES):
        for box in pair(drawn(seed, "head", "pole", relation=relation, sizes=sizes)):
            assert box.min() > 0 and box.max() < 1


def test_words_become_their_numbers():
    found = drawn(
        3, "ball", "bar", relation="on", colours=("blue", None), background="sea", time="night", style="neon"
    )
    assert BACKGROUNDS[found.background] == "sea" and TIMES[found.time] == "night"
    assert STYLES[found.style] == "neon"
    first = list(found.thing).index(0)
    assert COLOURS[found.tint[first] - 1] == "blue" and found.tint.sum() == found.tint[first]


def test_a_batch_equals_one_by_one_and_repeats():
    scenes = [scene("ball"), scene("head", "hat", relation="wearing"), scene("bar", count=4)]
    batch = layouts(scenes, plain_atlas(), [np.random.default_rng(i) for i in range(3)])
    for i, one in enumerate(scenes):
        for stacked, alone in zip(batch, layout(one, plain_atlas(), np.random.default_rng(i)), strict=True):
            np.testing.assert_array_equal(stacked[i], alone)
            assert stacked.dtype == alone.dtype
