"""Training with fewer layers of the text encoder: from pictures or latents, and what does not go together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import engine
from engine.config import DataConfig, FinetuneConfig, FinetuneStage, OptimConfig, SamplesConfig
from engine.train import finetune
from engine.train.workdir import remember
from engine.types import UserError
from launch import cache
from tests.tiny import SHALLOW, tiny_folder

PROMPTS = ("a red car", "a blue car on grass")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", **SHALLOW | {"text_encoder": {}})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 200, 30)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(PROMPTS[number % 2])
    return folder


@pytest.fixture
def config(model, pictures):
    """Two steps of all pictures."""

    def config(clip_skip, latents="", **options):
        optimizer = OptimConfig(learning_rate=1e-3, warmup_steps=0, decay_steps=0)
        stage = FinetuneStage(steps=2, batch_size=4, ema=(0.5,), caption_dropout=0.5, optim=optimizer)
        data = DataConfig() if latents else DataConfig(paths=(str(pictures),))
        how = {"clip_skip": clip_skip, "data": data, "latents": str(latents), "finetune": stage}
        return FinetuneConfig(model=str(model), **how, **options)

    return config


@pytest.fixture(scope="module")
def cached(model, pictures, tmp_path_factory):
    return cache_of(model, pictures, tmp_path_factory.mktemp("cached") / "cache", "--clip_skip", 1)


def cache_of(model, pictures, out, *more):
    flags = ("--model", model, "--data", pictures, "--out", out, *more)
    assert cache.main([str(flag) for flag in flags]) == 0
    return out


def first_losses(config, workdir):
    """The loss of the first batch, and the gradient's norm of each part of the U-Net."""
    task = finetune.begin(config)
    aim, key = finetune.objective(config, task), jax.random.key(0, impl="threefry2x32")
    batch = jax.tree.map(jnp.asarray, finetune.batches(config, task, workdir)(0))
    gradient = jax.jit(jax.value_and_grad(lambda params: aim.loss(params, aim.frozen, batch, key)[0]))
    loss, gradients = gradient(task.params)
    return [loss, *(optax.tree.norm(part) for part in gradients["unet"].values())]


def test_latents_train_as_the_pictures_that_they_were_made_of(config, cached, tmp_path):
    whole, less = (first_losses(config(n), tmp_path / str(n)) for n in (0, 1))
    np.testing.assert_allclose(first_losses(config(1, cached), tmp_path / "cached"), less, rtol=2e-3)
    assert np.abs(np.divide(whole, less) - 1).max() > 2e-3
    with pytest.raises(UserError, match="or another clip_skip"):
        finetune.train(config(0, cached), tmp_path / "other")
    remember(config(1), tmp_path / "1")
    with pytest.raises(UserError, match="holds a run with clip_skip=1, not 0"):
        finetune.train(config(0), tmp_path / "1")


def test_the_advice_for_latents_of_another_depth_is_right(config, model, pictures, tmp_path):
    whole = cache_of(model, pictures, tmp_path / "cache")
    with pytest.raises(UserError, match=r"launch\.cache --model FOLDER --clip_skip 1$"):
        finetune.train(config(1, whole), tmp_path / "run")


def test_samples_are_what_the_model_draws_so(config, tmp_path):
    """Of a run that hardly changes it, and so draws what it drew."""
    samples = SamplesConfig(prompts=("a red car",), every=2, steps=2, seed=3)
    still = config(1, samples=samples)
    still.finetune.optim.learning_rate = 1e-9
    finetune.train(still, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "samples" / "00000002.png").convert("RGB")).astype(int)
    wanted, other = (
        engine.load(still.model, clip_skip=n).generate(["a red car"], seed=3, steps=2)[0].astype(int)
        for n in (1, 0)
    )
    places = [
        sheet[y : y + 16, x : x + 16] for y in range(sheet.shape[0] - 15) for x in range(sheet.shape[1] - 15)
    ]
    assert min(np.abs(place - wanted).max() for place in places) <= 1
    assert min(np.abs(place - other).max() for place in places) > 1


def test_mistakes_are_told_before_the_training(config, tmp_path):
    with pytest.raises(UserError, match="clip_skip=-1 is out of range; write 0 to 99"):
        config(-1).validate()
    with pytest.raises(UserError, match="clip_skip=2: of this model's text encoder write 0 to 1"):
        finetune.train(config(2), tmp_path)
