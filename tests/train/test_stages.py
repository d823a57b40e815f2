"""The latents' scale, and batches that are addressed by their step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import world
from engine.train import data
from engine.train.objectives import applier, to_float
from engine.train.scaling import METRIC_IMAGES, in_units_of_pixels, pixel_metric
from engine.world.drawing import laid_out
from engine.world.tellers import drawn
from tests.tiny import tiny_model, tiny_tokenizer


def test_latents_in_units_of_pixels_and_the_same_pictures():
    vae = tiny_model(vae={"scaling_factor": 1.0}).vae
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)

    @jax.jit
    def look(params):
        module = applier(vae.graphdef)(params)
        posterior = module.encode(to_float(jnp.asarray(images)))
        return posterior.mean, jnp.exp(posterior.logvar), module.decode(posterior.mean)

    params = in_units_of_pixels(vae, vae.params, images)
    before, old_variance, pictures = look(vae.params)
    z, variance, same_pictures = look(params)
    np.testing.assert_allclose(same_pictures, pictures, atol=1e-4 * float(jnp.abs(pictures).max()))

    C = z.shape[-1]
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-4)
    covariance = np.cov(np.asarray(z).reshape(-1, C).T, bias=True)
    spread = np.diag(covariance)
    np.testing.assert_allclose(covariance, np.diag(spread), atol=1e-4)
    np.testing.assert_allclose(spread.mean(), 1, rtol=1e-4)
    assert (np.diff(spread) < 0).all()

    # the same step costs the same in every direction, which it did not before
    old_cost = pixel_metric(vae.graphdef, vae.params, before[:METRIC_IMAGES])
    cost = pixel_metric(vae.graphdef, params, z[:METRIC_IMAGES])
    np.testing.assert_allclose(cost, cost[0, 0] * np.eye(C), atol=1e-3 * float(cost[0, 0]))
    assert np.linalg.cond(old_cost) > 1.5
    # and the posterior's variance is one number: what the old one costs, over what a step costs now
    expected = np.trace(np.asarray(old_cost) * old_variance.mean((0, 1, 2))) / (C * cost[0, 0])
    np.testing.assert_allclose(variance, expected, rtol=1e-3)


def test_the_pixel_metric_is_what_a_step_costs():
    vae = tiny_model(vae={"scaling_factor": 1.0}).vae
    z = np.random.default_rng(0).standard_normal((64, 8, 8, 4), np.float32)
    metric = np.asarray(pixel_metric(vae.graphdef, vae.params, z))
    decode = jax.jit(lambda z: applier(vae.graphdef)(vae.params).decode(z))
    direction = np.array([1.0, -2.0, 0.5, 1.0], np.float32)
    signs = np.random.default_rng(1).choice([-1e-3, 1e-3], (64, 8, 8, 1)).astype(np.float32)
    cost = np.square(decode(z + signs * direction) - decode(z - signs * direction)).sum() / 4e-6 / signs.size
    np.testing.assert_allclose(direction @ metric @ direction, cost, rtol=0.15)  # two draws of signs


def test_bytes_become_the_range_of_the_model():
    np.testing.assert_allclose(
        to_float(jnp.array([[[[0, 255, 51]]]], jnp.uint8))[0, 0, 0], [-1, 1, -0.6], atol=1e-6
    )


def test_batches_go_on_from_any_step():
    batch_at = data.captioned_pictures(5, 3, 32, tiny_tokenizer())
    whole, rest = data.batches(batch_at, 0), data.batches(batch_at, 2)
    first, second, third, fourth = (next(whole) for _ in range(4))
    for ours, theirs in ((next(rest), third), (next(rest), fourth), (batch_at(2), third)):
        for name in ("image", "ids"):
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert not np.array_equal(first["image"], second["image"])
    whole.close()
    rest.close()


def test_a_batch_is_scenes_with_their_captions():
    images, captions, truths = world.batch(5, 6, 3, 32)
    batch = data.captioned_pictures(5, 3, 32, tiny_tokenizer())(2)
    np.testing.assert_array_equal(batch["image"], images)
    np.testing.assert_array_equal(batch["ids"], tiny_tokenizer().encode(captions))
    assert batch["image"].shape == (3, 32, 32, 3) and batch["image"].dtype == np.uint8

    alone = data.pictures(5, 3, 32)(2)
    assert alone.keys() == {"image"}
    np.testing.assert_array_equal(alone["image"], images)

    told = data.captions_with_facts(5, 3, tiny_tokenizer())(2)
    np.testing.assert_array_equal(told["ids"], batch["ids"])
    np.testing.assert_array_equal(told["facts"], [world.facts(scene) for scene in truths])


@pytest.mark.parametrize("step, least, most", [(0, 64, 64), (5, 24, 44), (10, 0, 8), (99, 0, 8)])
def test_easy_scenes_grow_rare(step, least, most, monkeypatch):
    """All at step 0, half of them at step 5 of 10 (and of the rest some are easy by chance)."""
    drawn = []

    def told(*args):
        drawn.extend((found := laid_out(*args)).scenes)
        return found

    monkeypatch.setattr(data, "laid_out", told)
    data.captioned_pictures(1, 64, 32, tiny_tokenizer(), easy=1.0, easy_steps=10)(step)
    plain = ((None,), ("big",), "middle", "day", "plain")
    easy = [(scene.colours, scene.sizes, scene.place, scene.time, scene.style) == plain for scene in drawn]
    assert least <= sum(easy) <= most


@pytest.mark.parametrize("tellers", [0, 1])
def test_an_error_while_telling_reaches_the_loop(tellers):
    with pytest.raises(ZeroDivisionError):
        next(data.batches(drawn(_broken, 32, tellers), 0))


def _broken(step):
    return 1 // step
