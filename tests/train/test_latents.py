"""Cached latents and contexts train as the pictures and captions that they were made of."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from engine.config import DataConfig, ObjectiveConfig, OptimConfig
from engine.errors import UserError
from engine.train import latents, optim
from engine.train.data import Batch
from engine.train.objectives import cached_loss, text_to_image_loss
from engine.train.sources import PictureBatches, Skipped, training_batches
from engine.weights.folder import Model
from launch import cache
from tests.tiny import SHALLOW, tiny_folder, tiny_model
from tests.train.laid_out import LAYOUTS, listed, noisy, plain_png, write

ARRAYS = ("mean", "logvar", "context")
BATCH = 4
CONFIG = DataConfig(buckets=3, multiple=8, size=16, workers=2, seed=1)
OBJECTIVE = ObjectiveConfig(caption_dropout=0.5)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(**SHALLOW)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("pictures") / "data"
    LAYOUTS["webdataset"](folder, 14)
    return dataclasses.replace(CONFIG, paths=(str(folder),))


@pytest.fixture(scope="module")
def cached(model, config, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(model, config, folder)
    return folder


@pytest.fixture
def quick_encoder(monkeypatch):
    """No networks: arrays that tell the pictures apart."""

    def encode(images, captions):
        values = images.reshape(len(images), -1)[:, :8].astype(np.float16)
        return {name: values.reshape(-1, 2, 2, 2) for name in ARRAYS}

    monkeypatch.setattr(latents, "_encoder", lambda model, batch_size: encode)
    monkeypatch.setattr(latents, "SHARD", 3)


def write_cache(model, config, folder, batch_size=3, **options):
    pictures = PictureBatches(config, BATCH, config.size, Skipped(folder / "skipped.jsonl"))
    latents.write_cache(model, pictures, folder, batch_size, **options)


def losses(loss, params, frozen, batches: list[Batch]) -> np.ndarray:
    """Of the steps of a short training."""
    optimizer = optim.optimizer(OptimConfig(learning_rate=1e-3, warmup_steps=1, decay_steps=0), 100)

    @jax.jit
    def update(params, state, batch, key):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state, value

    state, found = optimizer.init(params), []
    for i, batch in enumerate(batches):
        params, state, value = update(params, state, batch, jax.random.fold_in(jax.random.key(0), i))
        found.append(float(value))
    return np.array(found)


def test_training_on_the_cache_is_training_on_the_pictures(model, config, cached, tmp_path):
    """With half of the captions dropped: the empty context is cached too."""
    pictures_at = training_batches(config, BATCH, model.tokenizer, size=16, workdir=tmp_path)
    cached_at = latents.cached_batches(cached, BATCH, config.seed)
    steps = [i for i in range(12) if cached_at(i)["mean"].shape[1:3] == (8, 8)]  # a shape: one program
    frozen = {"vae": model.vae.params, "text_encoder": model.text_encoder.params}
    frozen["empty_ids"] = model.tokenizer.encode([""])[0]
    empty = {"empty": latents.empty(cached, model)}
    scale = model.vae.config.scaling_factor

    whole = text_to_image_loss(model.graphdefs, model.scheduler, OBJECTIVE)
    short = cached_loss(model.unet.graphdef, model.scheduler, OBJECTIVE, scale)
    theirs = losses(whole, model.unet.params, frozen, [pictures_at(i) for i in steps])
    ours = losses(short, model.unet.params, empty, [cached_at(i) for i in steps])
    assert len(set(theirs)) == len(steps) > 5
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_cached_batches_are_those_of_the_pictures(model, config, cached, tmp_path):
    """In all three shapes, in the same order, whatever was padded."""
    pictures_at = training_batches(config, BATCH, model.tokenizer, size=16, workdir=tmp_path)
    cached_at = latents.cached_batches(cached, BATCH, config.seed)

    @jax.jit
    def encode(image, ids):
        vae, text = (latents.applier(part.graphdef)(part.params) for part in (model.vae, model.text_encoder))
        posterior = vae.encode(latents.to_float(image))
        return {"mean": posterior.mean, "logvar": posterior.logvar, "context": text.context(ids)}

    shapes = set()
    for i in range(9):
        whole, batch = encode(**pictures_at(i)), cached_at(i)
        shapes.add(batch["mean"].shape)
        for name in ARRAYS:
            assert batch[name].dtype == np.float16
            np.testing.assert_allclose(batch[name], whole[name], rtol=2e-3, atol=2e-3)
    assert len(shapes) == 3


def test_hosts_share_each_batch(cached):
    whole, *halves = (latents.cached_batches(cached, BATCH, 1, i, n) for i, n in ((0, 1), (0, 2), (1, 2)))
    for i in (5, 0, 7):
        for name in ARRAYS:
            assert (whole(i)[name] == np.concatenate([half(i)[name] for half in halves])).all()


def test_a_stopped_cache_is_not_whole_and_goes_on(model, config, quick_encoder, tmp_path):
    write_cache(model, config, tmp_path / "whole")

    def stop(done: int, whole: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(model, config, tmp_path / "cache", report=stop)
    with pytest.raises(UserError, match="holds no whole cache"):
        latents.cached_batches(tmp_path / "cache", BATCH, 0)
    first = next((tmp_path / "cache").glob("00-*"))
    written = first.stat().st_mtime_ns
    write_cache(model, config, tmp_path / "cache")
    assert first.stat().st_mtime_ns == written
    names = {file.name for file in (tmp_path / "cache").iterdir()}
    assert names == {file.name for file in (tmp_path / "whole").iterdir()}
    for name in names:
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_pictures_or_another_model_are_refused(model, config, cached, tmp_path):
    for other_model, other_config in (
        (tiny_model(1), config),
        (model, dataclasses.replace(config, buckets=1)),
    ):
        with pytest.raises(UserError, match="holds other pictures, or those of another model"):
            write_cache(other_model, other_config, cached)
    with pytest.raises(UserError, match="this autoencoder takes multiples of 2"):
        write_cache(model, dataclasses.replace(config, buckets=1, size=15), tmp_path)


def test_the_command(tmp_path, capsys):
    folder, data = (
        str(tiny_folder(tmp_path / "model")),
        write(tmp_path / "data", {"0.png": noisy("PNG")[:3000]}),
    )
    for n in range(3):
        write(data, {f"{n}.txt": "a fox", f"{n + 1}.png": plain_png(n)})
    out = tmp_path / "cache"
    assert cache.main(["--model", folder, "--data", str(data), "--out", str(out), "--size", "16"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert len(listed(out)) == 2  # one damaged, one without a caption
    batch = latents.cached_batches(out, 2, 0)(0)
    assert batch["mean"].shape == (2, 8, 8, 4) and batch["context"].shape == (2, 16, 24)
    assert json.loads((out / "cache.json").read_text())["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "write --model FOLDER; --help explains it"),
        (["--model", "m"], "write --data PATH; --help explains it"),
        (["pictures"], "'pictures' is no flag: write --data pictures"),
        (["--model", "m", "--data", "d", "--out", "o", "--batch_size", "0"], "batch_size=0: write 1 or more"),
        (["--model", "m", "--data", "d", "--out", "o", "--kind", "tar"], "^--kind='tar' is unknown"),
        (
            ["--model", "m", "--data", "d", "--out", "o", "--kind", "world"],
            "no pictures to read: leave it out",
        ),
        (["--model", "m", "--data", "d", "--out", "o", "--buckets", "0"], "^--buckets=0 is out of range"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        cache.main(arguments)
