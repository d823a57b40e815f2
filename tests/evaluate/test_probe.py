"""The probe: shapes, truth, files. How well it reads is measured by launch.evaluate, which trains it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import scenes
from engine.evaluate import probe, probe_training
from engine.types import UserError


@pytest.fixture(scope="module")
def params():
    """A probe that has seen a few hundred renders: enough to know backgrounds."""
    return probe_training.train(steps=50, batch_size=16)


def test_it_learns(params):
    assert probe_training.accuracy(params, n=100)["background"] > 0.5  # by chance: 1 in 16


def test_a_question_has_its_classes(params):
    images, _ = probe_training.renders(0, 0, 3)
    logits = probe.apply(params, jnp.asarray(images))
    assert logits.first.shape == logits.second.shape == (3, len(scenes.THINGS) + 1)
    assert logits.background.shape == (3, len(scenes.BACKGROUNDS))
    assert logits.arrangement.shape == (3, len(scenes.ARRANGEMENTS))
    assert logits.where.shape == (3, 2, 64)


def test_reading_does_not_depend_on_the_batch(params):
    images, _ = probe_training.renders(0, 0, 7)
    together, apart = probe.read(params, images, 7), probe.read(params, images, 3)
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pictures_of_other_sizes_are_read_at_the_probe_s_size(params):
    colours = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3), np.uint8)
    small, large = (np.broadcast_to(colours, (8, size, size, 3)) for size in (probe.SIZE, 160))
    for one, other in zip(probe.read(params, small), probe.read(params, large), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_truth_of_renders():
    images, shown = probe_training.renders(7, 20, 40)
    single = shown.answers.second == probe.NONE
    assert 0 < single.sum() < 40
    np.testing.assert_array_equal(shown.answers.arrangement < len(scenes.PLACES), single)
    np.testing.assert_allclose(shown.where[:, 0].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(shown.where[:, 1].sum(-1), ~single, rtol=1e-5)
    again, _ = probe_training.renders(7, 25, 1)
    np.testing.assert_array_equal(again[0], images[5])


def test_the_map_peaks_where_the_thing_is():
    spot = probe_training._spot((8, 32, 24, 64)).reshape(8, 8)  # middle: x 16, y 48
    x, y = (spot.sum(0) * np.arange(8)).sum(), (spot.sum(1) * np.arange(8)).sum()
    np.testing.assert_allclose([(x + 0.5) * 8, (y + 0.5) * 8], [16, 48], atol=0.6)


def test_softening_keeps_the_picture():
    images, _ = probe_training.renders(0, 0, 4)
    softened = np.asarray(probe_training.soften(jnp.asarray(images), jax.random.key(1)))
    assert softened.shape == images.shape
    difference = np.sqrt(((softened - images) ** 2).mean((1, 2, 3)))
    assert (difference > 0.1).all() and (difference < 40).all()


def test_files(params, tmp_path):
    path = tmp_path / "deep" / "probe.safetensors"
    probe.save(params, path)
    loaded = probe.load(path)
    assert loaded.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(loaded[name], value)
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    probe.save({name: value for name, value in params.items() if name != "position"}, path)
    with pytest.raises(UserError, match="another version"):
        probe.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="delete it"):
        probe.load(path)


def test_the_cache_is_trained_once(monkeypatch, tmp_path):
    monkeypatch.setattr(probe_training.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    trainings = []

    def train():
        trainings.append(1)
        return probe.init(jax.random.key(0))

    monkeypatch.setattr(probe_training, "train", train)
    first, second = probe_training.trained(), probe_training.trained()
    assert len(trainings) == 1
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)
    monkeypatch.setattr(probe_training, "STEPS", 1)  # another probe has another name
    probe_training.trained()
    assert len(trainings) == 2
