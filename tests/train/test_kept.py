"""Pictures that come again: their latents are kept, their captions are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import world
from engine.config import DataConfig
from engine.train import kept, stages
from engine.train.data import captioned_pictures
from engine.train.stage_data import Scenes
from engine.types import UserError
from tests.long import LONG
from tests.tiny import tiny_tokenizer
from tests.train.tiny_run import get_config, plain_steps

SEED = 7


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(kept, "STEPS", 2)
    config = get_config()
    stage = config.diffusion
    stage.batch_size, stage.easy, stage.easy_steps = 4, 0.5, 2
    stage.distinct = 5 * stage.batch_size
    return config


@pytest.fixture
def vae(config):
    return stages.components(config, tiny_tokenizer())["vae"]


@pytest.fixture
def made(monkeypatch):
    """How many batches were drawn."""
    drawn = []

    def batch(*args):
        drawn.append(args)
        return world.batch(*args)

    monkeypatch.setattr(kept, "batch", batch)
    return drawn


def test_the_first_round_is_what_would_be_drawn(config, vae, tmp_path):
    batch_at = kept.kept_latents(config, SEED, tiny_tokenizer(), vae, tmp_path)
    fresh = captioned_pictures(SEED, 4, 32, tiny_tokenizer(), 0.5, 2)
    for step in (3, 0, 4):
        images, ids = fresh(step).values()
        np.testing.assert_array_equal(batch_at(step)["ids"], ids)
        expected = kept.applier(vae.graphdef)(vae.params).encode(kept.to_float(jnp.asarray(images))).mean
        np.testing.assert_allclose(batch_at(step)["mean"], expected, atol=2e-3)


def test_later_rounds_tell_the_same_scenes_in_other_words(config, vae, tmp_path, made):
    batch_at = kept.kept_latents(config, SEED, tiny_tokenizer(), vae, tmp_path)
    rounds = [[batch_at(step + 5 * again) for step in range(5)] for again in range(3)]
    assert len(made) == 5  # each once
    for later in rounds[1:]:
        for one, other in zip(rounds[0], later, strict=True):
            np.testing.assert_array_equal(one["mean"], other["mean"])
    ids = [np.concatenate([each["ids"] for each in batches]) for batches in rounds]
    assert all((ids[a] != ids[b]).any(1).mean() > 0.5 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert world.retold(SEED, 0, 3, 0.5, 0) == world.told(SEED, 0, 3, 0.5)[0]


def test_a_run_that_goes_on_reads_what_is_there(config, vae, tmp_path, made):
    before = [kept.kept_latents(config, SEED, tiny_tokenizer(), vae, tmp_path)(step) for step in (0, 4)]
    drawn = len(made)
    again = kept.kept_latents(config, SEED, tiny_tokenizer(), vae, tmp_path)
    for step, one in zip((0, 4), before, strict=True):
        for name, array in again(step).items():
            np.testing.assert_array_equal(array, one[name])
    assert len(made) == drawn == 3  # two steps of the first file, one of the last

    other = dataclasses.replace(vae, params=jax.tree.map(lambda x: 1.5 * x, vae.params))
    changed = kept.kept_latents(config, SEED, tiny_tokenizer(), other, tmp_path)(0)
    assert len(made) == drawn + 2
    assert np.abs(changed["mean"] - before[0]["mean"]).max() > 0.01


def test_hosts_share_each_batch(config, vae, tmp_path):
    whole, *halves = (
        kept.kept_latents(config, SEED, tiny_tokenizer(), vae, tmp_path / str(n), process, n)(8)
        for process, n in ((0, 1), (0, 2), (1, 2))
    )
    np.testing.assert_array_equal(whole["ids"], np.concatenate([half["ids"] for half in halves]))
    joined = np.concatenate([half["mean"] for half in halves])
    np.testing.assert_allclose(whole["mean"], joined, atol=2e-3)


@LONG  # of what is tested above, and the stages of test_own.py
def test_a_training_with_them(config, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CAPTIONS_FOR_TOKENIZER", 200)
    monkeypatch.setattr(stages, "LATENT_IMAGES", 16)
    plain_steps(config).diffusion.steps = 7
    config.words.steps, config.decoder.steps = 1, 0
    assert stages.train(config, tmp_path) is not None
    assert len([*(tmp_path / "latents").iterdir()]) == 3
    assert Scenes(config).captioned(tiny_tokenizer())(0).keys() == {"image", "ids"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"distinct": 6}, "diffusion.distinct=6: write a multiple of diffusion.batch_size=4"),
        ({"distinct": 2}, "write a multiple of diffusion.batch_size=4"),
        ({"caption_shuffle": True}, "write caption_shuffle=False"),
    ],
)
def test_mistakes(config, changes, told):
    config.diffusion = dataclasses.replace(config.diffusion, **changes)
    with pytest.raises(UserError, match=told):
        config.validate()


def test_pictures_of_one_s_own_come_again_anyway(config):
    config.data = DataConfig(paths=("pictures",))
    config.words.steps, config.diffusion.easy, config.diffusion.train_text_encoder = 0, 0.0, True
    with pytest.raises(UserError, match=r"data\.paths are other pictures: write diffusion\.distinct=0"):
        config.validate()
