"""A training from scratch on the drawn world, whose pictures are drawn on the device."""

import numpy as np
import pytest

import engine
from engine import world
from engine.config import DataConfig
from engine.train import stages
from engine.train.stage_data import Scenes, stage_data
from engine.types import UserError
from engine.world import tellers
from tests.tiny import tiny_tokenizer
from tests.train.tiny_run import get_config, plain_steps


@pytest.fixture
def config():
    config = get_config()
    config.diffusion.easy = 0.0
    return config


def test_a_model_that_knows_its_words(config, tmp_path, monkeypatch):
    """The world may be named, or not; the stages' learning is told by test_resume.py."""
    monkeypatch.setattr(stages, "CAPTIONS_FOR_TOKENIZER", 200)
    monkeypatch.setattr(stages, "LATENT_IMAGES", 16)
    plain_steps(config)
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


@pytest.fixture
def pool():
    """Of this test alone; its size is that of no other."""
    yield lambda: tellers._pool(3)
    tellers._pool(3).shutdown()
    tellers._pool.cache_clear()


def test_tellers_tell_the_same_scenes(config, pool):
    """Whether steps follow each other, or one goes back."""
    config.diffusion.easy, config.diffusion.easy_steps = 0.5, 4
    alone = Scenes(config).captioned(tiny_tokenizer())
    config.data.tellers = 3
    told = Scenes(config).captioned(tiny_tokenizer())
    for step in (2, 3, 1, 40):
        here, there = alone(step), told(step)
        assert here.keys() == there.keys() == {"image", "ids"}
        for name in here:
            np.testing.assert_array_equal(here[name], there[name])


def test_tellers_work_ahead(pool):
    tell = tellers.Tellers(3, _twice)
    assert [tell(step) for step in (5, 6)] == [10, 12]
    assert sorted(tell._under_way) == list(range(6, 6 + 3 * tellers.AHEAD))


def _twice(step):
    return 2 * step


def test_a_teller_that_is_killed(pool):
    tell = tellers.Tellers(3, _twice)
    tell(0)
    for process in pool()._processes.values():
        process.kill()
    with pytest.raises(UserError, match=r"killed: write a lower data\.tellers"):
        for step in range(1, 100):
            tell(step)
    with pytest.raises(UserError, match="was killed"):  # found broken before anything is asked of it
        tell(100)
