"""Composed pictures: sprites where the layout says, in the colours asked for, one program for all."""

import colorsys
import functools

import numpy as np
import pytest

from engine.world import atlas, compose
from engine.world.layout import Layout, layouts
from engine.world.scene import COLOURS, STYLES, TIMES
from tests.compiled import COMPILED
from tests.world.sprites import THINGS, plain_atlas, scene

SIZE, BATCH = 64, 12


@functools.cache
def tables() -> compose.Textures:
    return compose.textures(plain_atlas(), variants=1)


def laid(scenes, seeds=None) -> Layout:
    return layouts(scenes, plain_atlas(), [np.random.default_rng(s) for s in seeds or range(len(scenes))])


def pictures(found: Layout) -> np.ndarray:
    """Composed in batches of BATCH, so that all tests share one program; the last is filled up and cut."""
    n = len(found.side)
    rows = np.minimum(np.arange(-(-n // BATCH) * BATCH), n - 1)
    parts = [Layout(*(a[rows[i : i + BATCH]] for a in found)) for i in range(0, len(rows), BATCH)]
    done = [np.asarray(compose.compose(tables(), part, SIZE)) for part in parts]
    return np.concatenate(done)[:n].astype(int)


def drawn(scenes, seeds=None) -> np.ndarray:
    return pictures(laid(scenes, seeds))


def without(found: Layout) -> Layout:
    """The same backgrounds with nothing before them."""
    return found._replace(thing=np.full_like(found.thing, -1))


def changed(found: Layout) -> np.ndarray:
    """Where the pictures show something, (B, S, S)."""
    return abs(pictures(found) - pictures(without(found))).max(-1) > 100


def test_sprites_are_drawn_where_the_layout_says():
    found = laid([scene("ball", place=place) for place in ("left", "right", "top", "bottom", "middle")] * 2)
    for i, seen in enumerate(changed(found)):
        rows, columns = np.nonzero(seen)
        centre = (columns.mean() + 0.5) / SIZE, (rows.mean() + 0.5) / SIZE
        np.testing.assert_allclose(centre, found.centre[i, 0], atol=0.01)
        width = found.side[i, 0] * plain_atlas().extent[0, 0]
        assert np.ptp(columns) + 1 == pytest.approx(width * SIZE, abs=2)


def test_angle_and_mirror_turn_what_is_drawn(monkeypatch):
    """A sprite that is dark in its upper left corner, in four positions."""
    found = laid([scene("head")] * 4, [0] * 4)
    side = np.full_like(found.side, 0.8)
    centre = np.full_like(found.centre, 0.5)
    angle = np.zeros_like(found.angle)
    angle[1:3, 0] = np.pi / 2  # counter-clockwise: what was up is left
    mirrored = np.zeros_like(found.mirrored)
    mirrored[2:, 0] = True
    marked = plain_atlas().pixels.copy()
    marked[3, 20:40, 20:40] = (0, 0, 0, 255)
    with monkeypatch.context() as patch:  # the backgrounds, which take seconds to paint, are left out
        patch.setattr(
            compose.backgrounds,
            "table",
            lambda *_: np.zeros((1, compose.GROUND, compose.GROUND, 4), np.uint8),
        )
        table = compose.textures(atlas.from_pixels(THINGS, marked), variants=1)
    table = table._replace(grounds=tables().grounds)
    rows = np.minimum(np.arange(BATCH), 3)
    found = found._replace(side=side, centre=centre, angle=angle, mirrored=mirrored)
    image = np.asarray(compose.compose(table, Layout(*(a[rows] for a in found)), SIZE)).astype(int)
    upright = image[0].sum(-1)
    corner = [upright[14:24, 14:24], upright[14:24, 40:50], upright[40:50, 14:24], upright[40:50, 40:50]]
    assert np.argmin([part.mean() for part in corner]) == 0
    assert abs(image[1] - np.rot90(image[0])).mean() < 4
    assert abs(image[3] - image[0][:, ::-1]).mean() < 4
    assert abs(image[2] - np.rot90(image[0][:, ::-1])).mean() < 4


HUES = {
    "red": 0,
    "orange": 30,
    "yellow": 50,
    "green": 125,
    "blue": 222,
    "purple": 278,
    "pink": 331,
    "brown": 25,
}


@pytest.mark.parametrize("thing", ["ball", "pole", "bar", "head"])
def test_painted_sprites_have_the_colour(thing):
    found = laid([scene(thing, colours=(colour,), background="plain yellow") for colour in COLOURS])
    seen = pictures(found)
    for i, colour in enumerate(COLOURS):
        x, y = (found.centre[i, 0] * SIZE).astype(int)
        at = seen[i, y - 1 : y + 2, x - 1 : x + 2].mean((0, 1)) / 255
        hue, saturation, value = colorsys.rgb_to_hsv(*at)
        if colour in HUES:
            away = (hue * 360 - HUES[colour] + 180) % 360 - 180
            assert abs(away) < 14 and saturation > 0.4, (colour, at)
        else:
            assert saturation < 0.16, (colour, at)
        bounds = {"black": (0, 0.25), "grey": (0.4, 0.7), "white": (0.85, 1), "brown": (0.25, 0.6)}
        low, high = bounds.get(colour, (0.5, 1.0))
        assert low <= value <= high, (colour, at)


def test_paint_leaves_pupils_dark_and_the_unpainted_alone():
    found = laid(
        [scene("head"), scene("head", colours=("blue",)), scene("head", colours=("white",))], [5, 5, 5]
    )
    found = found._replace(angle=np.zeros_like(found.angle))
    plain, *painted = pictures(found)
    x = found.centre[0, 0, 0] + found.side[0, 0] * 20 / 96
    eye = int(found.centre[0, 0, 1] * SIZE), int(x * SIZE)
    assert plain[eye].max() < 60 and all(image[eye].max() < 90 for image in painted)
    forehead = int(found.centre[0, 0, 1] * SIZE - 12), int(found.centre[0, 0, 0] * SIZE)
    np.testing.assert_allclose(plain[forehead], (250, 200, 60), atol=3)


def test_a_picture_does_not_depend_on_its_neighbours_and_repeats():
    scenes = [scene("head", "hat", relation="wearing", style=s, background="city") for s in STYLES]
    found = laid(scenes)
    together = pictures(found)
    np.testing.assert_array_equal(together, pictures(found))
    for i in range(len(scenes)):
        alone = pictures(Layout(*(a[i : i + 1] for a in found)))
        np.testing.assert_array_equal(alone[0], together[i])


def test_one_program_draws_all_scenes():
    drawn([scene("ball")])
    COMPILED.clear()
    drawn([scene("bar", count=3, style="neon"), scene("head", "ball", relation="holding", background="sea")])
    drawn([scene("pole", colours=("red",), background="farm", time="rain", style="photo")])
    assert COMPILED["jit(_compose)"] == 0


def test_times_change_the_light():
    day, sunset, night, rain = drawn([scene("ball", background="sea", time=t) for t in TIMES], [1] * 4)
    sky = [image[:14].mean((0, 1)) for image in (day, sunset, night, rain)]
    assert sky[0].argmax() == 2 and sky[1].argmax() == 0
    assert sky[2].mean() < 70 and np.ptp(sky[3]) < 25
    assert night.mean() < 0.6 * day.mean() and rain.mean() < 0.9 * day.mean()


def test_styles_are_what_they_are_called():
    scenes = [scene("ball", background="meadow", colours=("blue",), style=style) for style in STYLES]
    plain, watercolour, pencil, pixels, neon, photo = drawn(scenes, [2] * len(STYLES))
    side = SIZE // 32
    blocks = pixels.reshape(32, side, 32, side, 3)
    assert (blocks == blocks[:, :1, :, :1]).all() and len(np.unique(pixels)) <= 6
    assert np.median(neon) < 60 < np.percentile(neon, 99)
    assert watercolour[:2].min() > 200 and watercolour.mean() > plain.mean()
    background = np.ptp(pencil[:8].mean((0, 1)))
    assert background < 25 and pencil[:8].mean() > 150  # grey on paper
    assert photo[:3, :3].mean() < 0.85 * plain[:3, :3].mean()  # dark corners
    for image in (plain, watercolour, pencil, pixels, photo):
        centre = image[28:38, 28:38].mean((0, 1))
        assert centre.argmax() == 2  # blue it stays
    assert neon.reshape(-1, 3)[neon.max(-1).ravel() > 120].mean(0).argmax() == 2


def test_a_photo_s_things_stand_in_their_shadow():
    found = laid([scene("ball", style="photo", place="middle")])
    x, y, _, strength = found.shadow[0, 0]
    image = pictures(found)[0].mean(-1)
    under = image[round(float(y) * SIZE) + 2, round(float(x) * SIZE)]
    assert strength == 1 and under < 0.75 * image[round(float(y) * SIZE) + 2, 4]


def test_a_size_that_squares_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="squares"):
        compose.compose(tables(), laid([scene("ball")]), 72)
