"""Pictures are addressed by (seed, index), and show what their scene says."""

import collections

import numpy as np
import pytest

from engine import emoji
from engine.scenes import (
    ARRANGEMENTS,
    BACKGROUNDS,
    FACTS,
    PLACES,
    RELATIONS,
    THINGS,
    Scene,
    batch,
    example,
    facts,
    labels,
    render,
    sample_scene,
    told,
    world,
)
from engine.scenes import sprites as sprites_module
from engine.scenes.backgrounds import paint
from engine.types import UserError


def test_an_example_depends_on_its_address_alone():
    images, captions, scenes = batch(5, 40, 6, 32)
    for i in (3, 0, 5):  # out of order, after others were drawn
        image, caption, scene = example(5, 40 + i, 32)
        np.testing.assert_array_equal(image, images[i])
        assert (caption, scene) == (captions[i], scenes[i])
    assert len(set(captions)) > 1 and captions != batch(6, 40, 6, 32)[1]


def test_the_same_scene_at_every_size():
    small, caption, scene = example(2, 9, 32)
    large, same_caption, same_scene = example(2, 9, 128)
    assert small.shape == (32, 32, 3) and large.shape == (128, 128, 3)
    assert (caption, scene) == (same_caption, same_scene)


def test_composing_is_the_over_operator():
    piece = sprites_module.sprite(0, 20, False)
    image = np.full((40, 40, 3), 90, np.uint8)
    sprites_module.paste(image, piece, 30, -5)  # cut at the right and at the top
    alpha = 1 - piece.inverse_alpha[5:, :10] / 255
    expected = piece.premultiplied[5:, :10] + 90 * (1 - alpha)
    np.testing.assert_allclose(image[: piece.height - 5, 30:], expected, atol=0.51)
    assert (image[:, :30] == 90).all() and (image[piece.height - 5 :] == 90).all()


def _boxes(scene: Scene, seed: int, size: int = 64):
    """(left, right, top, bottom) of each thing, in the scene's order."""
    boxes = world.draw(scene, size, np.random.default_rng(seed))[1]
    return [(left, right, top, bottom) for left, top, right, bottom in boxes]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", ["small", "big"])
def test_places(place, size):
    for seed, thing in enumerate(THINGS):
        [(left, right, top, bottom)] = _boxes(Scene((thing.name,), (size,), place, "sky"), seed)
        assert min(left, top) >= 0 and max(right, bottom) <= 64
        x, y = (left + right) / 2 - 32, (top + bottom) / 2 - 32
        dx, dy = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}.get(place, (0, 0))
        assert (abs(x) <= 3) if dx == 0 else x * dx >= 4
        assert (abs(y) <= 3) if dy == 0 else y * dy >= 4


def test_relations():
    rng = np.random.default_rng(0)
    seen = collections.Counter()
    while min(seen[relation] for relation in RELATIONS) < 40:
        scene = sample_scene(rng)
        if len(scene.things) == 1:
            continue
        seen[scene.arrangement] += 1
        a, b = _boxes(scene, seen.total())
        assert min(*a, *b) >= -1 and max(*a, *b) <= 65, scene
        if scene.arrangement == "left of":
            assert a[1] < b[0], scene
        elif scene.arrangement == "above":
            assert a[3] < b[2], scene
        elif scene.arrangement == "on":
            assert a[2] < b[2] and a[3] > b[2] + 1, scene
            assert abs(a[0] + a[1] - b[0] - b[1]) <= 10, scene
        else:
            assert a[0] < (b[0] + b[1]) / 2 < a[1] and b[3] < a[3], scene


def test_what_stands_on_something_touches_it():
    rng = np.random.default_rng(1)
    for thing in THINGS:
        if thing.name == "fox":
            continue
        scene = Scene(("fox", thing.name), ("big", "small"), "on", "sky")
        (upper, x1, y1), (lower, x2, y2) = world.place(scene, 64, rng)
        masks = np.zeros((2, 96, 96), bool)
        for mask, piece, x, y in ((masks[0], lower, x2, y2), (masks[1], upper, x1, y1)):
            mask[16 + y :, 16 + x :][: piece.height, : piece.width] = piece.inverse_alpha[..., 0] < 128
        shared = (masks[0] & masks[1]).sum()
        assert 0 < shared < 0.35 * min(masks[0].sum(), masks[1].sum()), thing.name


def test_backgrounds_and_things_differ_and_vary():
    painted = {name: paint(name, 16, np.random.default_rng(1)).astype(int) for name in BACKGROUNDS}
    again = {name: paint(name, 16, np.random.default_rng(2)).astype(int) for name in BACKGROUNDS}
    for name, image in painted.items():
        assert np.abs(image - again[name]).max() > 2
        nearest = min(BACKGROUNDS, key=lambda other: np.abs(again[other] - image).mean())
        assert nearest == name
    pictures = [sprites_module.sprite(i, 24, False).premultiplied.tobytes() for i in range(len(THINGS))]
    assert len(set(pictures)) == len(THINGS)


def test_labels_name_the_scene():
    rng = np.random.default_rng(8)
    for _ in range(200):
        scene = sample_scene(rng)
        first, second, background, arrangement = labels(scene)
        assert tuple(THINGS[i].name for i in (first, second) if i >= 0) == scene.things
        assert BACKGROUNDS[background] == scene.background
        assert ARRANGEMENTS[arrangement] == scene.arrangement


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (Scene(("fox",), ("small",), "left", "sky"), {"left": "fox", "first size": 0, "second size": 2}),
        (Scene(("fox", "cat"), ("big", "small"), "left of", "sky"), {"left": "fox", "right": "cat"}),
        (Scene(("fox", "cat"), ("big", "small"), "above", "sky"), {"top": "fox", "bottom": "cat"}),
        (Scene(("fox", "car"), ("big", "small"), "on", "sky"), {"middle": "fox", "underneath": "car"}),
        (Scene(("fox", "crown"), ("big", "small"), "wearing", "sky"), {"middle": "fox", "top": "crown"}),
    ],
)
def test_facts_say_what_is_where(scene, expected):
    found = dict(zip(FACTS, facts(scene), strict=True))
    assert all(0 <= answer < FACTS[question] for question, answer in found.items())
    names = [thing.name for thing in THINGS] + [None]
    for question, answer in found.items():
        if question in ("left", "right", "top", "bottom", "middle", "underneath"):
            assert names[answer] == expected.get(question)
        elif question in expected:
            assert answer == expected[question]
    assert BACKGROUNDS[found["background"]] == "sky"
    assert ARRANGEMENTS[found["arrangement"]] == scene.arrangement


def test_easy_scenes_show_one_big_thing_in_the_middle():
    for i in range(50):
        scene = sample_scene(np.random.default_rng(i), easy=1.0)
        assert (len(scene.things), scene.sizes, scene.arrangement) == (1, ("big",), "middle")


def test_captions_without_pictures_are_those_of_the_pictures():
    _, captions, truths = world.batch(3, 5, 4, 16)
    assert told(3, 5, 4) == (captions, truths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"things": ("fox", "fox")}, "two different"),
        ({"things": ("wolf", "cat")}, "unknown thing 'wolf'"),
        ({"arrangement": "left"}, "arrangement 'left'"),
        ({"background": "moon base"}, "unknown background"),
        ({"sizes": ("big",)}, "sizes"),
    ],
)
def test_a_scene_refuses_nonsense(change, message):
    good = {"things": ("fox", "cat"), "sizes": ("big", "big"), "arrangement": "on", "background": "sky"}
    Scene(**good)
    with pytest.raises(ValueError, match=message):
        Scene(**{**good, **change})


def test_without_the_font_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv(emoji.FONT_VARIABLE, str(tmp_path / "none.ttf"))
    with pytest.raises(UserError, match="fonts-noto-color-emoji"):
        emoji.font_path()


def test_render_leaves_the_painted_background_alone():
    """Backgrounds are cached: drawing on one must not show in the next picture."""
    scene = Scene(("heart",), ("big",), "middle", "white")
    first = render(scene, 32, np.random.default_rng(3))
    for seed in range(20):
        render(scene, 32, np.random.default_rng(seed))
    np.testing.assert_array_equal(first, render(scene, 32, np.random.default_rng(3)))
