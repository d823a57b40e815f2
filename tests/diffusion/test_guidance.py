"""Classifier-free guidance on a network whose two predictions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from engine.diffusion import samplers, schedules
from engine.diffusion.guidance import guided, within
from engine.diffusion.noise import image_keys
from engine.diffusion.parameterization import PREDICTION_TYPES, denoiser
from engine.diffusion.schedules import SchedulerConfig, schedule_for

SCHEDULE = schedule_for(SchedulerConfig("DDIMScheduler"))
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
T = jnp.asarray([3.0, 700.0])
COND, UNCOND = (jax.random.normal(jax.random.key(seed), (2, 5, 8)) for seed in (1, 2))


def apply(x, t, context):
    """Depends on every argument, image by image, so that a mixed-up batch shows."""
    return jnp.sin(3 * x + t[:, None, None, None] / 200 + context.sum((1, 2))[:, None, None, None])


def test_guidance_extrapolates_from_the_unconditional_prediction():
    cond, uncond = apply(X, T, COND), apply(X, T, UNCOND)
    for scale in (0.0, 1.0, 7.5):
        expected = uncond + scale * (cond - uncond)
        np.testing.assert_allclose(guided(apply, COND, UNCOND, scale)(X, T), expected, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guiding_predictions_is_guiding_denoised_images(prediction_type):
    sigma = jnp.asarray([0.5, 9.0])
    cond, uncond, both = (
        denoiser(network, prediction_type, SCHEDULE)(X, sigma)
        for network in (
            lambda x, t: apply(x, t, COND),
            lambda x, t: apply(x, t, UNCOND),
            guided(apply, COND, UNCOND, 4.0),
        )
    )
    np.testing.assert_allclose(both, uncond + 4 * (cond - uncond), rtol=1e-4, atol=1e-4)


def test_without_the_unconditional_pass_the_batch_is_not_doubled():
    sizes = []

    def counted(x, t, context):
        sizes.append((len(x), len(t), len(context)))
        return apply(x, t, context)

    alone = guided(counted, COND, UNCOND, 1.0, run_uncond=False)(X, T)
    both = guided(counted, COND, UNCOND, 1.0)(X, T)
    assert sizes == [(2, 2, 2), (4, 4, 4)]
    np.testing.assert_allclose(alone, both, atol=1e-6)
    np.testing.assert_array_equal(alone, apply(X, T, COND))


def test_scales_are_arguments_of_the_compiled_program():
    traces = []

    @jax.jit
    def run(scale, rescale):
        traces.append(1)
        return guided(apply, COND, UNCOND, scale, rescale)(X, T)

    for scale, rescale in ((2.0, 0.0), (7.5, 0.7)):
        np.testing.assert_allclose(
            run(scale, rescale), guided(apply, COND, UNCOND, scale, rescale)(X, T), atol=1e-5
        )
    assert len(traces) == 1


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_equals_the_originals(rescale):
    cond, uncond = (torch.tensor(np.asarray(apply(X, T, context))) for context in (COND, UNCOND))
    theirs = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=rescale)
    np.testing.assert_allclose(guided(apply, COND, UNCOND, 7.5, rescale)(X, T), theirs, rtol=1e-4, atol=1e-5)


def test_half_precision_predictions_are_combined_in_float32():
    def half(x, t, context):
        return apply(x, t, context).astype(jnp.bfloat16)

    cond, uncond = (half(X, T, context).astype(jnp.float32) for context in (COND, UNCOND))
    np.testing.assert_allclose(
        guided(half, COND, UNCOND, 7.5)(X, T), uncond + 7.5 * (cond - uncond), rtol=1e-5, atol=1e-5
    )
    assert guided(half, COND, UNCOND, 1.0, run_uncond=False)(X, T).dtype == jnp.float32


def test_guidance_within_some_noise_levels_runs_where_it_is_and_nowhere_else():
    """Known answer: Euler's steps by hand; and only one of the two networks runs at a step."""
    ran = []

    def told(name, share):
        def denoise(x, sigma):
            jax.debug.callback(lambda: ran.append(name))
            return share * x

        return denoise

    sigmas = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.0], np.float32)
    for steps in (range(0, 5), range(1, 3), range(0, 2), range(3, 5), range(4, 5)):
        ran.clear()
        limits = schedules.levels(sigmas, steps)
        mixed = within(told("guided", 0.5), told("plain", 0.1), *map(jnp.float32, limits))
        found = samplers.sample("euler", mixed, X, jnp.asarray(sigmas), image_keys(0, range(len(X))))[0]
        jax.effects_barrier()
        assert sorted(ran) == ["guided"] * len(steps) + ["plain"] * (5 - len(steps))
        expected = X
        for i in range(5):
            slope = (1 - (0.5 if i in steps else 0.1)) / sigmas[i]
            expected = expected + expected * slope * (sigmas[i + 1] - sigmas[i])
        np.testing.assert_allclose(found, expected, rtol=1e-5)
