"""The probe of the drawn world: shapes, maps, files, and that its training learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import world
from engine.evaluate import reader, reader_training
from engine.evaluate.answers import NO_THING, QUESTIONS
from engine.types import UserError


@pytest.fixture(scope="module")
def params():
    return reader.init(jax.random.key(3))


@pytest.fixture(scope="module")
def drawn():
    return reader_training.renders(7, 20, 20)


def test_a_question_has_its_answers(params, drawn):
    logits = reader.apply(params, jnp.asarray(drawn.images[:3]))
    assert {name: each.shape for name, each in logits.answers.items()} == {
        name: (3, answers) for name, answers in QUESTIONS.items()
    }
    assert logits.where.shape == (3, 2, 64)
    assert logits.features.shape == (3, reader.FEATURES)


def test_reading_does_not_depend_on_the_batch(params, drawn):
    together = reader.read(params, drawn.images)
    for i in (0, 13, 19):
        alone = reader.read(params, drawn.images[i : i + 1])
        np.testing.assert_allclose(alone.features[0], together.features[i], atol=1e-4)
        for name, column in alone.answers._asdict().items():
            assert column[0] == getattr(together.answers, name)[i]
            np.testing.assert_allclose(np.exp(alone.log_probs[name]).sum(), 1, rtol=1e-5)


def test_pictures_of_other_sizes_are_read_at_the_probe_s_size(params):
    colours = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3), np.uint8)
    small, large = (np.broadcast_to(colours, (8, size, size, 3)) for size in (64, reader.SIZE))
    np.testing.assert_allclose(
        reader.read(params, small).features, reader.read(params, large).features, atol=1e-4
    )


def test_the_truth_of_renders(drawn):
    single = drawn.answers.second == NO_THING
    assert 0 < single.sum() < 20
    np.testing.assert_allclose(drawn.where[:, 0].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(drawn.where[:, 1].sum(-1), ~single, rtol=1e-5)
    again = reader_training.renders(7, 25, 2)
    np.testing.assert_array_equal(again.images, drawn.images[5:7])
    held = [world.held_out(scene) for scene in drawn.scenes]
    assert held == [i % reader_training.HELD_OUT_EVERY == 0 for i in range(20, 40)]


def centre(where):
    grid = where.reshape(8, 8)
    return [(grid.sum(axis) * (np.arange(8) + 0.5) / 8).sum() for axis in (0, 1)]


def test_the_maps_peak_where_the_things_are():
    pair = world.Scene(
        ("fox", "umbrella"), (None, None), ("big", "big"), 1, None, "under", "sky", "day", "plain"
    )
    _, layouts = world.draw([pair], [np.random.default_rng(0)], 32)
    where = reader_training.places([pair], layouts)[0]
    tops = [centre(each)[1] for each in where]
    assert tops[0] < tops[1]  # the umbrella is the first to be seen
    for thing, each in ((1, where[0]), (0, where[1])):
        (place,) = np.flatnonzero(layouts.thing[0] == thing)
        np.testing.assert_allclose(centre(each), layouts.centre[0, place], atol=0.1)


def test_softening_keeps_the_picture(drawn):
    softened = np.asarray(reader_training.soften(jnp.asarray(drawn.images), jax.random.key(1)))
    assert softened.shape == drawn.images.shape
    difference = np.sqrt(((softened - drawn.images) ** 2).mean((1, 2, 3)))
    assert (difference > 0.1).all() and (difference < 45).all()


def test_files(params, tmp_path):
    path = tmp_path / "deep" / "probe.safetensors"
    reader.save(params, path)
    loaded = reader.load(path)
    assert loaded.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_allclose(loaded[name], value, atol=1e-3)
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    reader.save({name: value for name, value in params.items() if name != "position"}, path)
    with pytest.raises(UserError, match="another version"):
        reader.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is no probe"):
        reader.load(path)
    with pytest.raises(UserError, match="is no probe"):
        reader.load(tmp_path / "nowhere")
