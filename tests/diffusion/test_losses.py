"""The training loss on a Gaussian, where the best network and its loss are known in closed form."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import TIME_SAMPLINGS, ObjectiveConfig
from engine.config import WEIGHTINGS as WEIGHTING_NAMES
from engine.diffusion.losses import (
    TIME_BINS,
    WEIGHTINGS,
    by_timestep,
    check_terminal,
    diffusion_loss,
    loss_at,
    sample_eps,
    sample_sigmas,
    weight,
)
from engine.diffusion.parameterization import PREDICTION_TYPES, coefficients, per_image
from engine.diffusion.schedules import SchedulerConfig, schedule_for
from engine.errors import UserNotice
from engine.types import UserError

FLOW = schedule_for(SchedulerConfig("FlowMatchEulerDiscreteScheduler", prediction_type="flow_prediction"))
VP = schedule_for(SchedulerConfig("DDIMScheduler", rescale_betas_zero_snr=True))
SPREAD = 0.5  # images are N(0, SPREAD^2)


UNIFORM = ObjectiveConfig(time_sampling="uniform")
MIN_SNR = ObjectiveConfig(weighting="min_snr", snr_gamma=5.0)
P2 = ObjectiveConfig(weighting="p2", p2_k=2.0, p2_gamma=0.5)
SNRS = np.array([1e-3, 0.5, 1.0, 4.0, 5.0, 6.0, 1e3], np.float32)
KEY = jax.random.key(0)


def schedule_of(prediction_type):
    return FLOW if prediction_type == "flow_prediction" else VP


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("time_sampling", TIME_SAMPLINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_best_network_reaches_the_known_loss(prediction_type, time_sampling, weighting):
    """E[x0 | x] = s^2 x / (s^2 + sigma^2) leaves x0 the variance s^2 sigma^2 / (s^2 + sigma^2), and the
    prediction that variance over c_out^2, as x0 - D = c_out (target - F). Times the weight."""
    objective = ObjectiveConfig(time_sampling=time_sampling, weighting=weighting)
    x0 = SPREAD * jax.random.normal(jax.random.key(5), (64, 16, 16, 4))
    wanted = {}

    def best(x_in, t):
        sigma = wanted["sigma"]
        c_in, c_skip, c_out = (per_image(c, x_in) for c in coefficients(sigma, prediction_type))
        x = x_in / c_in
        D = SPREAD**2 * x / (SPREAD**2 + per_image(sigma, x) ** 2)
        return (D - c_skip * x) / c_out

    def loss(apply):
        return diffusion_loss(apply, x0, KEY, schedule_of(prediction_type), prediction_type, objective)

    wanted["sigma"] = loss(lambda x, t: jnp.zeros_like(x))[1]
    per_sample, sigma = loss(best)
    np.testing.assert_array_equal(sigma, wanted["sigma"])
    c_out = coefficients(sigma, prediction_type).c_out
    variance = SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2) / c_out**2
    keep = np.asarray(variance) > 1e-4  # below, float32 rounding is the larger part
    assert keep.sum() > 20
    ratio = (per_sample / variance / weight(sigma, prediction_type, objective))[keep]
    np.testing.assert_allclose(ratio, 1, rtol=0.25)  # 1024 values each: 4 % spread
    np.testing.assert_allclose(ratio.mean(), 1, atol=0.03)


def test_the_config_names_what_there_is():
    assert tuple(WEIGHTINGS) == WEIGHTING_NAMES


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_uniform_weighs_the_networks_own_error(prediction_type):
    np.testing.assert_array_equal(weight(jnp.asarray(SNRS**-0.5), prediction_type, UNIFORM), 1)


# of Hang et al. 2023, section 3.4, and Choi et al. 2022, equation 8, the latter with the changes of target
PAPERS = {
    ("epsilon", "min_snr"): np.minimum(SNRS, 5) / SNRS,
    ("v_prediction", "min_snr"): np.minimum(SNRS, 5) / (SNRS + 1),
    ("sample", "min_snr"): np.minimum(SNRS, 5),
    ("flow_prediction", "min_snr"): np.minimum(SNRS, 5) / (1 + SNRS**0.5) ** 2,
    ("epsilon", "p2"): 1 / (2 + SNRS) ** 0.5,
    ("v_prediction", "p2"): SNRS / (SNRS + 1) / (2 + SNRS) ** 0.5,
    ("sample", "p2"): SNRS / (2 + SNRS) ** 0.5,
    ("flow_prediction", "p2"): SNRS / (1 + SNRS**0.5) ** 2 / (2 + SNRS) ** 0.5,
}


@pytest.mark.parametrize("prediction_type, weighting", PAPERS)
def test_weights_are_those_of_the_papers(prediction_type, weighting):
    objective = {"min_snr": MIN_SNR, "p2": P2}[weighting]
    ours = weight(jnp.asarray(SNRS**-0.5), prediction_type, objective)
    np.testing.assert_allclose(ours, PAPERS[prediction_type, weighting], rtol=1e-5)


def test_p2_of_gamma_0_is_the_uniform_weight_of_eps():
    plain = ObjectiveConfig(weighting="p2", p2_gamma=0.0)
    np.testing.assert_allclose(weight(jnp.asarray(SNRS**-0.5), "epsilon", plain), 1, rtol=1e-6)


@pytest.mark.parametrize("objective", [MIN_SNR, P2], ids=["min_snr", "p2"])
def test_a_weighted_loss_is_the_same_whatever_the_network_predicts(objective):
    """Four networks that are one denoiser, D = x / 2; a flow's is shown another x_in."""
    sigma = jnp.asarray([0.1, 0.5, 1.0, 3.0])
    x0, eps = jax.random.normal(KEY, (2, 4, 8, 8, 2))

    def loss(prediction_type):
        c_in, c_skip, c_out = (per_image(c, x0) for c in coefficients(sigma, prediction_type))

        def halves(x_in, t):
            return (x_in / c_in * 0.5 - c_skip * x_in / c_in) / c_out

        schedule = schedule_of(prediction_type)
        return loss_at(halves, x0, eps, sigma, schedule, prediction_type, objective)

    for prediction_type in PREDICTION_TYPES[1:]:
        np.testing.assert_allclose(loss(prediction_type), loss("epsilon"), rtol=1e-3)


def test_uniform_draws_every_training_timestep_alike():
    sigma = sample_sigmas(KEY, (20000,), VP, UNIFORM)
    t = np.asarray(VP.sigma_to_t(sigma))
    np.testing.assert_allclose(t, np.round(t), atol=1e-3)
    counts = np.histogram(t, 10, (0, 1000))[0]
    assert counts.min() > 1800 and counts.max() < 2200
    assert t.min() == 0 and t.max() == 999


def test_logit_normal_is_a_normal_logit_of_the_flows_t():
    sigma = sample_sigmas(KEY, (20000,), FLOW, ObjectiveConfig(time_mean=0.4, time_std=0.7))
    t = np.asarray(FLOW.sigma_to_t(sigma)) / 1000
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - 0.4) < 0.02 and abs(logit.std() - 0.7) < 0.02


def test_logit_normal_stays_on_the_table():
    sigma = np.asarray(sample_sigmas(KEY, (1000,), VP, ObjectiveConfig(time_std=20.0)))
    assert sigma.min() == VP.sigmas[0] and sigma.max() == VP.sigmas[-1]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"time_sampling": "logitnormal"},
            "time_sampling='logitnormal' is unknown (did you mean logit_normal?)",
        ),
        ({"time_sampling": "x"}, "objective.time_sampling='x' is unknown; write uniform, logit_normal"),
        (
            {"weighting": "min-snr"},
            "weighting='min-snr' is unknown (did you mean min_snr?); write uniform, min",
        ),
        ({"snr_gamma": 0.0}, "objective.snr_gamma=0.0: write a number above 0"),
        ({"p2_k": float("nan")}, "objective.p2_k=nan: write a number above 0"),
        ({"p2_gamma": -1.0}, "objective.p2_gamma=-1.0: write a number from 0"),
        ({"noise_offset": -0.1}, "objective.noise_offset=-0.1: write a number from 0"),
        ({"caption_dropout": 1.5}, "objective.caption_dropout=1.5: write 0 to 1"),
        ({"keep_tags": 2}, "keep_tags=2 without shuffling: write objective.caption_shuffle=True"),
    ],
)
def test_a_wrong_objective_is_refused(options, message):
    with pytest.raises(UserError) as error:
        diffusion_loss(
            lambda x, t: x, jnp.ones((2, 4, 4, 2)), KEY, VP, "v_prediction", ObjectiveConfig(**options)
        )
    assert message in str(error.value) and "\n" not in str(error.value)


def test_offset_noise_is_a_constant_of_each_image_and_channel():
    x0 = jnp.zeros((500, 4, 4, 3))
    plain, shifted = sample_eps(KEY, x0), sample_eps(KEY, x0, 0.5)
    constant = np.asarray(shifted - plain)
    np.testing.assert_allclose(constant, np.broadcast_to(constant[:, :1, :1], constant.shape), atol=1e-6)
    constant = constant[:, 0, 0]
    assert abs(constant.mean()) < 0.05 and abs(constant.std() - 0.5) < 0.05
    np.testing.assert_allclose(np.corrcoef(constant.T), np.eye(3), atol=0.15)
    pixels = np.asarray(plain[:, 0, 0])  # independent of the noise that it is added to
    assert abs(np.corrcoef(constant.ravel(), pixels.ravel())[0, 1]) < 0.1


def test_offset_noise_is_what_the_loss_adds():
    """Where x0 = 0, an eps network that answers x_in / c_in / sigma is right, offset or not."""
    objective = ObjectiveConfig(noise_offset=0.5)
    seen = []

    def nothing(x, t):
        seen.append(x)
        return jnp.zeros_like(x)

    losses, sigma = diffusion_loss(nothing, jnp.zeros((64, 8, 8, 2)), KEY, VP, "epsilon", objective)
    c_in = coefficients(sigma, "epsilon").c_in
    eps = seen[0] / per_image(c_in * sigma, seen[0])
    np.testing.assert_allclose(losses, jnp.mean(eps**2, (1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(losses.mean(), 1 + 0.5**2, rtol=0.1)


def test_a_half_precision_network_trains_in_float32():
    x0 = jax.random.normal(jax.random.key(5), (2, 4, 4, 2)).astype(jnp.bfloat16)
    loss, sigma = diffusion_loss(lambda x, t: x.astype(jnp.bfloat16), x0, KEY, VP, "v_prediction", UNIFORM)
    assert loss.dtype == sigma.dtype == jnp.float32


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_pure_noise_teaches_v_the_image(class_name, weighting):
    """At zero terminal SNR x_in = eps and v = -x0: loss and gradient are those of that regression."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    top = schedule_for(SchedulerConfig(class_name, rescale_betas_zero_snr=True, **betas))
    objective = ObjectiveConfig(time_mean=30.0, weighting=weighting)
    x0 = jax.random.normal(jax.random.key(5), (64, 4, 4, 2))

    def total(factor):
        seen = []

        def network(x, t):
            seen.append((x, t))
            return factor * x

        loss, sigma = diffusion_loss(network, x0, KEY, top, "v_prediction", objective)
        return loss.mean(), (sigma, *seen[0])

    (value, (sigma, x, t)), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(0.1))
    assert (sigma == top.sigmas[-1]).all() and (t == 999).all()
    w = weight(sigma, "v_prediction", objective)[0]
    assert w == 1 if weighting == "uniform" else 0 < w < 1e-6
    np.testing.assert_allclose(value, w * jnp.mean((0.1 * x + x0) ** 2), rtol=1e-3)
    np.testing.assert_allclose(gradient, w * jnp.mean(2 * x * (0.1 * x + x0)), rtol=1e-3, atol=1e-3 * w)


def test_eps_cannot_be_learned_from_pure_noise():
    with pytest.raises(UserError, match="prediction_type='epsilon' cannot learn from pure noise") as error:
        check_terminal(SchedulerConfig("DDIMScheduler", rescale_betas_zero_snr=True), UNIFORM)
    assert "write prediction_type='v_prediction'" in str(error.value) and "\n" not in str(error.value)
    check_terminal(SchedulerConfig("DDIMScheduler"), ObjectiveConfig())
    for prediction_type in ("v_prediction", "sample"):
        zero = SchedulerConfig("DDIMScheduler", rescale_betas_zero_snr=True, prediction_type=prediction_type)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_terminal(zero, UNIFORM)
        with pytest.warns(UserNotice, match="write time_sampling='uniform'"):
            check_terminal(zero, ObjectiveConfig(time_sampling="logit_normal"))


def test_times_of_a_logit_normal_hardly_end_in_pure_noise():
    """Which is why `check_terminal` tells of them."""
    drawn = VP.sigma_to_t(sample_sigmas(KEY, (20000,), VP, ObjectiveConfig(time_sampling="logit_normal")))
    assert float(jnp.mean(drawn > 990)) < 1e-3
    assert 5e-3 < float(jnp.mean(VP.sigma_to_t(sample_sigmas(KEY, (20000,), VP, UNIFORM)) > 990)) < 2e-2


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_losses_by_timestep_add_up(schedule):
    """A loss that is its timestep has its bins' middles as means."""
    sigma = sample_sigmas(KEY, (20000,), schedule, UNIFORM)
    losses = schedule.sigma_to_t(sigma)
    found = by_timestep(losses, sigma, schedule)
    assert found["loss_by_time"].shape == found["count_by_time"].shape == (TIME_BINS,)
    assert found["count_by_time"].sum() == 20000
    np.testing.assert_allclose(found["loss_by_time"].sum(), losses.sum(), rtol=1e-4)
    means = found["loss_by_time"] / found["count_by_time"]
    np.testing.assert_allclose(means, 1000 / TIME_BINS * (np.arange(TIME_BINS) + 0.5), atol=5)
