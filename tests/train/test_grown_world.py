"""A training from scratch on the grown world: all stages, on pictures that are drawn on the device."""

import json

import numpy as np
import pytest

import engine
from engine import world
from engine.config import DataConfig
from engine.train import stages
from engine.train.data import drawn_world
from engine.train.stage_data import Scenes, stage_data
from engine.train.tellers import Tellers
from engine.types import UserError
from tests.tiny import tiny_tokenizer
from tests.train.tiny_run import get_config


@pytest.fixture
def config():
    config = get_config()
    config.data, config.image_size = DataConfig(kind="world"), 32
    config.diffusion.easy = 0.0
    return config


def test_all_stages(config, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CAPTIONS_FOR_TOKENIZER", 200)
    monkeypatch.setattr(stages, "LATENT_IMAGES", 16)
    folder = stages.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} >= {"autoencoder", "words", "diffusion"}
    pipe = engine.load(folder)
    assert "accordion" in pipe.model.tokenizer.known_words
    assert pipe.generate(["a blue fox riding a horse"], seed=1, steps=2).shape[1:] == (32, 32, 3)

    config.data = DataConfig()
    with pytest.raises(UserError, match="a run on the grown world, not on the drawn scenes"):
        stages.train(config, tmp_path)


def test_hosts_share_each_batch(config):
    whole, *halves = (
        Scenes(config, process, processes, world).captioned(tiny_tokenizer())(3)
        for process, processes in ((0, 1), (0, 2), (1, 2))
    )
    for name in ("image", "ids"):
        np.testing.assert_array_equal(whole[name], np.concatenate([half[name] for half in halves]))
    images, _, _ = world.batch(config.seed + 1, 3 * len(whole["image"]), len(whole["image"]), 32)
    np.testing.assert_array_equal(whole["image"], images)


def test_sizes_that_cannot_be_drawn(config, tmp_path):
    config.image_size = 48
    with pytest.raises(UserError, match="size=48: the grown world is drawn in multiples of 32 pixels"):
        stage_data(config, tmp_path, 0, 1).images(1)


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


def test_training_with_tellers(config, tellers, tmp_path):
    config.data.tellers = 1
    assert isinstance(drawn_world(config.data), Tellers)
    told, alone = (Scenes(config, drawn=drawn).captioned(tiny_tokenizer())(2) for drawn in (tellers, world))
    np.testing.assert_array_equal(told["image"], alone["image"])
    np.testing.assert_array_equal(told["ids"], alone["ids"])


def test_a_teller_that_is_killed():
    tellers = Tellers(1)
    tellers.batch(0, 0, 1, 32)
    for process in tellers._pool._processes.values():
        process.kill()
    with pytest.raises(UserError, match=r"killed: write a lower data\.tellers"):
        tellers.batch(0, 1, 1, 32)
