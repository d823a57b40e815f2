"""The denoiser of every prediction type, against its definition: with the true F, D is x0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.diffusion.parameterization import PREDICTION_TYPES, coefficients, denoiser, target
from engine.diffusion.schedules import SchedulerConfig, schedule_for
from engine.types import UserError

FLOW = schedule_for(
    SchedulerConfig("FlowMatchEulerDiscreteScheduler", prediction_type="flow_prediction", shift=3.0)
)
VP = schedule_for(SchedulerConfig("DDIMScheduler", rescale_betas_zero_snr=True))
SHAPE = (5, 4, 4, 3)
X0, EPS = (jax.random.normal(jax.random.key(seed), SHAPE) for seed in (0, 1))
SIGMA = jnp.asarray([0.02, 0.3, 1.0, 7.0, 80.0])


def schedule_of(prediction_type):
    return FLOW if prediction_type == "flow_prediction" else VP


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_true_prediction_gives_back_the_image(prediction_type):
    F = target(X0, EPS, SIGMA, prediction_type)
    denoise = denoiser(lambda x, t: F, prediction_type, schedule_of(prediction_type))
    x = X0 + SIGMA[:, None, None, None] * EPS
    np.testing.assert_allclose(denoise(x, SIGMA), X0, atol=1e-4)  # x itself is rounded at 80 * 6e-8


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_network_sees_unit_variance_and_its_timestep(prediction_type):
    seen = {}

    def apply(x, t):
        seen.update(x=x, t=t)
        return x

    schedule = schedule_of(prediction_type)
    denoiser(apply, prediction_type, schedule)(X0 + SIGMA[:, None, None, None] * EPS, SIGMA)
    np.testing.assert_array_equal(seen["t"], schedule.sigma_to_t(SIGMA))
    if prediction_type == "flow_prediction":
        t = seen["t"][:, None, None, None] / 1000
        expected = (1 - t) * X0 + t * EPS
    else:
        alpha = 1 / np.sqrt(1 + SIGMA[:, None, None, None] ** 2)
        expected = alpha * X0 + np.sqrt(1 - alpha**2) * EPS
    np.testing.assert_allclose(seen["x"], expected, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_one_sigma_serves_the_whole_batch(prediction_type):
    denoise = denoiser(lambda x, t: jnp.sin(x + t[:, None, None, None]), prediction_type, FLOW)
    np.testing.assert_array_equal(denoise(X0, jnp.asarray(2.0)), denoise(X0, jnp.full(5, 2.0)))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_pure_noise_is_finite(prediction_type):
    schedule = schedule_of(prediction_type)
    sigma = jnp.asarray(schedule.sigmas[-1])
    denoised = denoiser(lambda x, t: 0.1 * x, prediction_type, schedule)(sigma * EPS, sigma)
    assert np.isfinite(denoised).all()
    if prediction_type == "v_prediction":  # F = -x0 at zero terminal SNR
        np.testing.assert_allclose(denoised, -0.1 * EPS, atol=2e-5)
    if prediction_type == "flow_prediction":  # F = eps - x0
        np.testing.assert_allclose(denoised, 0.9 * EPS, atol=2e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_arithmetic_is_float32_around_a_half_precision_network(prediction_type):
    """Only the network's output is rounded: the rest of D keeps x to the last bit of float32."""

    def half(x, t):
        return (0.1 * x).astype(jnp.bfloat16)

    schedule, x = schedule_of(prediction_type), X0 + 80 * EPS
    ours = denoiser(half, prediction_type, schedule)(x, jnp.asarray(80.0))
    exact = denoiser(lambda x, t: half(x, t).astype(jnp.float32), prediction_type, schedule)(
        x, jnp.asarray(80.0)
    )
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, exact)
    rounded = denoiser(half, prediction_type, schedule)(x.astype(jnp.bfloat16), jnp.asarray(80.0))
    assert rounded.dtype == jnp.float32


def test_v_is_the_angular_velocity():
    """Salimans & Ho 2022, appendix D: v = dz / d phi, z = cos(phi) x0 + sin(phi) eps, tan(phi) = sigma."""
    phi = jnp.arctan(SIGMA)[:, None, None, None]
    v = jax.jvp(lambda phi: jnp.cos(phi) * X0 + jnp.sin(phi) * EPS, (phi,), (jnp.ones_like(phi),))[1]
    np.testing.assert_allclose(target(X0, EPS, SIGMA, "v_prediction"), v, atol=1e-5)


def test_an_unknown_prediction_type_is_refused_before_sampling():
    with pytest.raises(UserError, match="prediction_type='eps' is not supported; supported: epsilon"):
        denoiser(lambda x, t: x, "eps", VP)
    with pytest.raises(UserError, match="prediction_type='eps'"):
        coefficients(jnp.ones(()), "eps")
    with pytest.raises(UserError, match="prediction_type='eps'"):
        target(X0, EPS, SIGMA, "eps")
