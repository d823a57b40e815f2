"""The training loss on a Gaussian, where the best network and its loss are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.diffusion.losses import diffusion_loss, sample_sigmas
from engine.diffusion.parameterization import PREDICTION_TYPES, coefficients, per_image
from engine.diffusion.schedules import SchedulerConfig, schedule_for
from engine.types import UserError

FLOW = schedule_for(SchedulerConfig("FlowMatchEulerDiscreteScheduler", prediction_type="flow_prediction"))
VP = schedule_for(SchedulerConfig("DDIMScheduler", rescale_betas_zero_snr=True))
SPREAD = 0.5  # images are N(0, SPREAD^2)


@pytest.mark.parametrize("time_sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_best_network_reaches_the_known_loss(prediction_type, time_sampling):
    """E[x0 | x] = s^2 x / (s^2 + sigma^2) leaves x0 the variance s^2 sigma^2 / (s^2 + sigma^2), and the
    prediction that variance over c_out^2, as x0 - D = c_out (target - F)."""
    schedule = FLOW if prediction_type == "flow_prediction" else VP
    x0 = SPREAD * jax.random.normal(jax.random.key(5), (64, 16, 16, 4))
    wanted = {}

    def best(x_in, t):
        sigma = wanted["sigma"]
        c_in, c_skip, c_out = (per_image(c, x_in) for c in coefficients(sigma, prediction_type))
        x = x_in / c_in
        D = SPREAD**2 * x / (SPREAD**2 + per_image(sigma, x) ** 2)
        return (D - c_skip * x) / c_out

    def loss(apply):
        return diffusion_loss(apply, x0, jax.random.key(0), schedule, prediction_type, time_sampling)

    wanted["sigma"] = loss(lambda x, t: jnp.zeros_like(x))[1]
    per_sample, sigma = loss(best)
    np.testing.assert_array_equal(sigma, wanted["sigma"])
    c_out = coefficients(sigma, prediction_type).c_out
    variance = SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2) / c_out**2
    keep = np.asarray(variance) > 1e-4  # below, float32 rounding is the larger part
    assert keep.sum() > 20
    np.testing.assert_allclose(per_sample[keep], variance[keep], rtol=0.25)  # 1024 values each: 4 % spread
    np.testing.assert_allclose((per_sample / variance)[keep].mean(), 1, atol=0.03)


def test_uniform_draws_every_training_timestep_alike():
    sigma = sample_sigmas(jax.random.key(0), (20000,), VP, "uniform")
    t = np.asarray(VP.sigma_to_t(sigma))
    np.testing.assert_allclose(t, np.round(t), atol=1e-3)
    counts = np.histogram(t, 10, (0, 1000))[0]
    assert counts.min() > 1800 and counts.max() < 2200
    assert t.min() == 0 and t.max() == 999


def test_logit_normal_is_a_normal_logit_of_the_flows_t():
    sigma = sample_sigmas(jax.random.key(0), (20000,), FLOW, "logit_normal", 0.4, 0.7)
    t = np.asarray(FLOW.sigma_to_t(sigma)) / 1000
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - 0.4) < 0.02 and abs(logit.std() - 0.7) < 0.02


def test_logit_normal_stays_on_the_table():
    sigma = np.asarray(sample_sigmas(jax.random.key(0), (1000,), VP, "logit_normal", 0.0, 20.0))
    assert sigma.min() == VP.sigmas[0] and sigma.max() == VP.sigmas[-1]


def test_an_unknown_time_sampling_is_refused():
    with pytest.raises(
        UserError, match="time_sampling='normal' is unknown; write one of uniform, logit_normal"
    ):
        sample_sigmas(jax.random.key(0), (2,), VP, "normal")


def test_a_half_precision_network_trains_in_float32():
    x0 = jax.random.normal(jax.random.key(5), (2, 4, 4, 2)).astype(jnp.bfloat16)
    loss, sigma = diffusion_loss(
        lambda x, t: x.astype(jnp.bfloat16), x0, jax.random.key(0), VP, "v_prediction"
    )
    assert loss.dtype == sigma.dtype == jnp.float32


def test_the_gradient_is_finite_at_pure_noise():
    x0 = jax.random.normal(jax.random.key(5), (64, 4, 4, 2))
    top = schedule_for(SchedulerConfig("DDIMScheduler", rescale_betas_zero_snr=True))

    def total(weight):
        loss, sigma = diffusion_loss(
            lambda x, t: weight * x, x0, jax.random.key(0), top, "v_prediction", "logit_normal", 30.0, 1.0
        )
        return loss.sum(), sigma

    (_, sigma), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(0.1))
    assert (sigma == top.sigmas[-1]).all() and np.isfinite(gradient) and gradient != 0
