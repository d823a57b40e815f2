"""Whitening, and batches that are addressed by their step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import scenes
from engine.train.data import scene_batch, scene_batches
from engine.train.objectives import applier, to_float
from engine.train.stages import whiten
from tests.tiny import tiny_model, tiny_tokenizer


def test_white_latents_and_the_same_pictures():
    vae = tiny_model(vae={"scaling_factor": 1.0}).vae
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    white = whiten(vae, vae.params, images)

    @jax.jit
    def look(params):
        module = applier(vae.graphdef)(params)
        posterior = module.encode(to_float(jnp.asarray(images)))
        z = posterior.sample(jax.random.key(0))
        return posterior.mean, z, module.decode(posterior.mean), module.decode(z)

    mean, sample, *pictures = look(vae.params)
    white_mean, white_sample, *white_pictures = look(white)
    axes = (0, 1, 2)
    assert np.abs(mean.std(axes) - 1).max() > 0.1  # there was something to do
    np.testing.assert_allclose(white_mean.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(white_mean.std(axes), 1, rtol=1e-4)
    # the posterior's spread moved along: what is drawn from it is the same draw, whitened
    np.testing.assert_allclose(
        white_sample, (sample - mean.mean(axes)) / mean.std(axes), atol=1e-4 * float(jnp.abs(sample).max())
    )
    for ours, theirs in zip(white_pictures, pictures, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))


def test_bytes_become_the_range_of_the_model():
    np.testing.assert_allclose(
        to_float(jnp.array([[[[0, 255, 51]]]], jnp.uint8))[0, 0, 0], [-1, 1, -0.6], atol=1e-6
    )


def test_batches_go_on_from_any_step():
    options = {"seed": 5, "batch_size": 3, "size": 16, "tokenizer": tiny_tokenizer()}
    whole = scene_batches(first_step=0, **options)
    rest = scene_batches(first_step=2, **options)
    first, second, third, fourth = (next(whole) for _ in range(4))
    for name in ("image", "ids"):
        np.testing.assert_array_equal(next(scene_batches(first_step=2, **options))[name], third[name])
    for ours, theirs in ((next(rest), third), (next(rest), fourth)):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
    assert not np.array_equal(first["image"], second["image"])
    whole.close()
    rest.close()


def test_a_batch_is_scenes_with_their_captions():
    images, captions, _ = scenes.batch(5, 6, 3, 16)
    batch = scene_batch(seed=5, step=2, batch_size=3, size=16, tokenizer=tiny_tokenizer())
    np.testing.assert_array_equal(batch["image"], images)
    np.testing.assert_array_equal(batch["ids"], tiny_tokenizer().encode(captions))
    assert batch["image"].shape == (3, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert scene_batch(seed=5, step=2, batch_size=3, size=16, tokenizer=None).keys() == {"image"}


def test_an_error_while_drawing_reaches_the_loop(monkeypatch):
    def broken(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(scenes, "batch", broken)
    with pytest.raises(RuntimeError, match="no font"):
        next(scene_batches(seed=0, first_step=0, batch_size=1, size=16))
