"""A training from scratch on the drawn world, whose pictures are drawn on the device."""

import jax
import numpy as np
import pytest

import engine
from engine import world
from engine.config import DataConfig
from engine.train import data, stages
from engine.train.stage_data import Scenes, stage_data
from engine.train.tellers import Tellers
from engine.types import UserError
from tests.tiny import tiny_tokenizer
from tests.train.tiny_run import get_config


@pytest.fixture
def config():
    config = get_config()
    config.diffusion.easy = 0.0
    return config


def test_a_model_that_knows_its_words(config, tmp_path, monkeypatch):
    """The world may be named, or not; the stages' learning is told by test_resume.py."""
    monkeypatch.setattr(stages, "CAPTIONS_FOR_TOKENIZER", 200)
    monkeypatch.setattr(stages, "LATENT_IMAGES", 16)
    for stage in (config.autoencoder, config.words, config.diffusion):
        stage.steps = 1
    config.decoder.steps = 0
    pipe = engine.load(stages.train(config, tmp_path))
    assert "accordion" in pipe.model.tokenizer.known_words
    assert pipe.generate(["a blue fox riding a horse"], seed=1, steps=2).shape[1:] == (32, 32, 3)
    config.data = DataConfig(kind="world")
    assert stages.train(config, tmp_path)  # the same run


def test_hosts_share_each_batch(config):
    whole, *halves = (
        Scenes(config, process, processes).captioned(tiny_tokenizer())(3)
        for process, processes in ((0, 1), (0, 2), (1, 2))
    )
    for name in ("image", "ids"):
        np.testing.assert_array_equal(whole[name], np.concatenate([half[name] for half in halves]))
    images, _, _ = world.batch(config.seed + 1, 3 * len(whole["image"]), len(whole["image"]), 32)
    np.testing.assert_array_equal(whole["image"], images)


def test_sizes_that_cannot_be_drawn(config, tmp_path):
    config.image_size = 48
    with pytest.raises(UserError, match="image_size=48: the world is drawn in multiples of 32 pixels"):
        stage_data(config, tmp_path, 0, 1)
    with pytest.raises(UserError, match="size=48: the world is drawn in multiples of 32 pixels"):
        world.batch(0, 0, 1, 48)


@pytest.fixture(scope="module")
def tellers():
    tellers = Tellers(2)
    yield tellers
    tellers._pool.shutdown()


@pytest.mark.parametrize("n", [1, 5])
def test_tellers_tell_the_same_scenes(tellers, n):
    here, there = world.batch(4, 7, n, 32, 0.5), tellers.batch(4, 7, n, 32, 0.5)
    np.testing.assert_array_equal(here[0], np.asarray(there[0]))
    assert here[1:] == there[1:]


def test_training_with_tellers(config, tellers, monkeypatch):
    monkeypatch.setattr(data, "Tellers", lambda count: {2: tellers}[count])
    alone = Scenes(config).captioned(tiny_tokenizer())(2)
    config.data.tellers = 2
    told = Scenes(config).captioned(tiny_tokenizer())(2)
    assert isinstance(told["image"], jax.Array) and not isinstance(alone["image"], jax.Array)
    np.testing.assert_array_equal(told["image"], alone["image"])
    np.testing.assert_array_equal(told["ids"], alone["ids"])


def test_a_teller_that_is_killed():
    tellers = Tellers(1)
    tellers.batch(0, 0, 1, 32)
    for process in tellers._pool._processes.values():
        process.kill()
    with pytest.raises(UserError, match=r"killed: write a lower data\.tellers"):
        tellers.batch(0, 1, 1, 32)
    with pytest.raises(UserError, match="was killed"):  # found broken before anything is asked of it
        tellers.batch(0, 1, 1, 32)
