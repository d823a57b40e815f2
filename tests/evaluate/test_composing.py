"""Groups of pictures of the drawn world: shares, likeness, and what training held that is nearest."""

import jax
import numpy as np
import pytest

import engine
from engine import world
from engine.evaluate import composing, neighbours, reader
from engine.evaluate.answers import marks, shares
from engine.evaluate.prompts import prompts
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def probe():
    return reader.init(jax.random.key(0))


MANY, FEW = 30, 3  # of pictures at once: each number compiles the drawing once


def rendered(probe, kind, held_out, n=MANY):
    """A group whose pictures are renders of their scenes."""
    texts, scenes = map(list, zip(*prompts(kind, held_out, n), strict=True))
    images, _ = world.draw(scenes, [np.random.default_rng(i) for i in range(n)], 64)
    return composing.Drawn(kind, held_out, texts, scenes, images, reader.read(probe, images))


def test_a_model_draws_a_group(probe, tmp_path):
    pipe = engine.load(tiny_folder(tmp_path / "model"))
    done = []
    drawn = composing.draw(pipe, probe, "colour", True, 5, seed=3, batch_size=2, report=done.append, steps=2)
    assert done == [2, 2, 1]
    assert drawn.images.shape[0] == len(drawn.scenes) == len(drawn.reading.answers.first) == 5
    assert drawn.sureness.shape == (5,) and (drawn.sureness < 0).all()
    alone = pipe.generate([drawn.prompts[3]], seed=3, first_index=3, steps=2)
    assert np.abs(alone[0].astype(int) - drawn.images[3]).max() <= 1


def test_the_table_has_a_row_for_each_group(probe):
    rows = composing.table([rendered(probe, *group, n=FEW) for group in composing.groups()])
    assert len(rows) == 9
    assert "count" in rows["count"] and "count" in rows["count, held out"]
    assert "relation" not in rows["style, held out"]
    assert all(0 <= share <= 1 for row in rows.values() for share in row.values())


def test_renders_are_as_like_as_renders(probe):
    group = rendered(probe, "relation", False)
    like = composing.likeness(probe, [group])
    assert 0 < like.pictures < 3 * like.renders
    noise = np.random.default_rng(0).integers(0, 256, group.images.shape, np.uint8)
    unlike = composing.likeness(probe, [group._replace(reading=reader.read(probe, noise))])
    assert unlike.pictures > 2 * like.pictures
    assert unlike.renders == like.renders and unlike.table == like.table


def test_the_probe_is_examined_on_renders_of_the_same_scenes(probe):
    group = rendered(probe, "count", False)
    rngs = [np.random.Generator(np.random.Philox(key=[composing.RENDER_SEED, i])) for i in range(MANY)]
    images, _ = world.draw(group.scenes, rngs, 64)
    expected = shares(marks(reader.read(probe, images).answers, group.scenes))
    assert composing.likeness(probe, [group]).table == {"count": expected}


def test_a_picture_of_the_training_is_its_own_neighbour(probe, monkeypatch):
    monkeypatch.setattr(neighbours, "AT_ONCE", MANY)
    captions, scenes = world.told(9, 40, FEW)
    images, _, _ = world.batch(9, 40, FEW, 64)
    told = []
    found = neighbours.nearest(probe, images, scenes, 9, range(100), 2, lambda *far: told.append(far))
    assert told[-1][0] == told[-1][1] >= FEW
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for image, caption, own in zip(images, captions, found, strict=True):
        assert own[0].caption == caption
        assert own[0].distance < 0.1 < own[1].distance
        np.testing.assert_array_equal(own[0].image, image)


def test_nothing_alike_has_no_neighbours(probe):
    images, _, scenes = world.batch(9, 0, FEW, 64)
    assert neighbours.nearest(probe, images, scenes, 9, range(0)) == [[]] * FEW
