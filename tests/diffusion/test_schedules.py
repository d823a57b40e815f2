"""Scheduler configs as real folders have them, and the noise levels that they mean.

tests/parity/test_schedulers.py holds grids and tables against PyTorch diffusers.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.schedulers import AysSchedules

from engine.diffusion.samplers import SAMPLERS
from engine.diffusion.schedules import (
    SIGMA_CAP,
    SchedulerConfig,
    alike,
    alphas_cumprod,
    final_scale,
    for_sampler,
    initial_scale,
    karras,
    sampler_name,
    sampler_options,
    schedule_for,
    sigmas_for,
)
from engine.types import UserError

BETAS = '"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "trained_betas": null'
FOLDERS = {  # name: (scheduler_config.json, sampler, last sigma is 0)
    "SD 1.5": (
        f"""{{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", {BETAS},
        "clip_sample": false, "num_train_timesteps": 1000, "set_alpha_to_one": false,
        "skip_prk_steps": true, "steps_offset": 1}}""",
        "pndm",
        False,
    ),
    "SD 2.1": (
        f"""{{"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", {BETAS}, "clip_sample": false,
        "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": false,
        "skip_prk_steps": true, "steps_offset": 1}}""",
        "ddim",
        False,
    ),
    "SDXL": (
        f"""{{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.28.2", {BETAS},
        "clip_sample": false, "final_sigmas_type": "zero", "interpolation_type": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "rescale_betas_zero_snr": false,
        "sample_max_value": 1.0, "set_alpha_to_one": false, "sigma_max": null, "sigma_min": null,
        "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading",
        "timestep_type": "discrete", "use_karras_sigmas": false}}""",
        "euler",
        True,
    ),
    "SDXL Turbo": (
        f"""{{"_class_name": "EulerAncestralDiscreteScheduler", {BETAS}, "clip_sample": false,
        "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "sample_max_value": 1.0, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
        "timestep_spacing": "trailing", "use_karras_sigmas": false}}""",
        "euler_ancestral",
        True,
    ),
    "PixArt": (
        """{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_end": 0.02,
        "beta_schedule": "linear", "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": false, "lambda_min_clipped": -Infinity, "lower_order_final": true,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
        "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0, "thresholding": false,
        "timestep_spacing": "linspace", "trained_betas": null, "use_karras_sigmas": false,
        "use_lu_lambdas": false, "variance_type": null}""",
        "dpmpp_2m",
        True,
    ),
    "LCM Dreamshaper": (
        f"""{{"_class_name": "LCMScheduler", "_diffusers_version": "0.22.0.dev0", {BETAS},
        "clip_sample": false, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": 1000, "original_inference_steps": 50, "prediction_type": "epsilon",
        "rescale_betas_zero_snr": false, "sample_max_value": 1.0, "set_alpha_to_one": true,
        "steps_offset": 1, "thresholding": false, "timestep_scaling": 10.0,
        "timestep_spacing": "leading"}}""",
        "lcm",
        True,
    ),
    "SD 3": (
        """{"_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
        "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3,
        "use_dynamic_shifting": false}""",
        "euler",
        True,
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_real_configs_are_read_and_written_back(name):
    text, sampler, ends_at_zero = FOLDERS[name]
    config = SchedulerConfig.from_json(json.loads(text), name)
    assert sampler_name(config) == sampler
    assert SchedulerConfig.from_json(json.loads(json.dumps(config.to_json())), name) == config
    sigmas = sigmas_for(config, 30)
    assert sigmas.shape == (31,) and (np.diff(sigmas) < 0).all() and (sigmas[-1] == 0) == ends_at_zero
    assert (final_scale(config, sigmas) == 1) == ends_at_zero


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def read(class_name="DDIMScheduler", **options):
    return SchedulerConfig.from_json({"_class_name": class_name, **options}, "s.json")


@pytest.mark.parametrize(
    ("class_name", "options", "message"),
    [
        ("KarrasVeScheduler", {}, "_class_name='KarrasVeScheduler'"),
        (None, {}, "_class_name=None"),
        (
            "DDIMScheduler",
            {"timestep_spacings": "leading"},
            "timestep_spacings.*did you mean timestep_spacing",
        ),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample=True is not supported; supported: False"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding"),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ("DDIMScheduler", {"beta_start": -1}, "between 0 and 1"),
        ("DDIMScheduler", {"beta_start": "0.1"}, "beta_start"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000 timesteps"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("DDIMScheduler", {"timestep_spacing": "even"}, "timestep_spacing='even'"),
        ("DDIMScheduler", {"steps_offset": "1"}, "steps_offset"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type"),
        ("PNDMScheduler", {}, "skip_prk_steps=False"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type='heun'"),
        ("DEISMultistepScheduler", {"solver_order": 4}, "solver_order=4"),
        ("DEISMultistepScheduler", {"lower_order_final": False}, "lower_order_final=False"),
        ("DEISMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("LCMScheduler", {"original_inference_steps": 0}, "original_inference_steps must be 1"),
        ("TCDScheduler", {"clip_sample": True}, "clip_sample"),
        ("KDPM2DiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("UniPCMultistepScheduler", {"solver_type": "vary_coeff"}, "solver_type='vary_coeff'"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0=False"),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector"),
        (
            "DPMSolverMultistepScheduler",
            {"final_sigmas_type": "sigma_min", "euler_at_final": True},
            "euler_at_final",
        ),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0}, "shift above 0"),
    ],
)
def test_what_is_not_implemented_is_refused_with_its_name(class_name, options, message):
    with pytest.raises(UserError, match=rf"^s\.json: .*{message}"):
        read(class_name, **options)


K_DIFFUSION = ("dpmpp_2s_ancestral", "dpmpp_3m_sde")  # no class of diffusers is theirs


def test_for_sampler_changes_the_grid_and_keeps_the_noise_schedule():
    config = SchedulerConfig.from_json(json.loads(FOLDERS["SD 1.5"][0]), "SD 1.5")
    for sampler in SAMPLERS:
        other = for_sampler(config, sampler)
        assert sampler_name(other) == (sampler if sampler not in K_DIFFUSION else "euler")
        np.testing.assert_array_equal(alphas_cumprod(other), alphas_cumprod(config))
        assert SchedulerConfig.from_json(other.to_json(), "written") == other
    # the default spacing is the class's own, a written one goes along
    assert for_sampler(config, "euler").spacing == "linspace"
    assert for_sampler(read(timestep_spacing="trailing"), "euler").spacing == "trailing"
    flow = read("FlowMatchEulerDiscreteScheduler", shift=3)
    assert for_sampler(flow, "heun") == flow
    with pytest.raises(UserError, match="did you mean dpmpp_2m"):
        for_sampler(config, "dpmpp_2")


def test_a_solvers_options_go_along_where_the_other_class_has_them():
    unipc = read("UniPCMultistepScheduler", solver_order=3, solver_type="bh1")
    assert sampler_options(unipc) == {"solver_order": 3, "solver_type": "bh1"}
    assert sampler_options(for_sampler(unipc, "deis")) == {"solver_order": 3}
    assert sampler_options(for_sampler(unipc, "dpmpp_2m")) == {}  # whose order is 2
    deis = read("DEISMultistepScheduler", algorithm_type="deis", solver_type="logrho")
    assert sampler_options(for_sampler(deis, "unipc")) == {"solver_order": 2, "solver_type": "bh2"}
    assert sampler_name(for_sampler(deis, "dpmpp_2m_sde")) == "dpmpp_2m_sde"


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(UserError, match=f"steps={steps} is out of range; write 1 to 1000"):
        sigmas_for(read(), steps)


def test_a_distilled_model_has_no_more_steps_than_its_distillation():
    lcm = read("LCMScheduler", original_inference_steps=40)
    assert len(sigmas_for(lcm, 40)) == 41
    with pytest.raises(UserError, match="steps=41 is out of range; write 1 to 40"):
        sigmas_for(lcm, 41)
    assert sampler_options(lcm)["timestep_scaling"] == 10
    np.testing.assert_array_equal(sampler_options(lcm)["schedule"].sigmas, schedule_for(lcm).sigmas)


@pytest.mark.parametrize(
    "class_name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize(
    "grid", ["linspace", "leading", "trailing", "sgm_uniform", "karras", "exponential", "ays"]
)
def test_every_grid_falls_from_noise_to_the_end_for_any_number_of_steps(class_name, grid):
    config = read(class_name, steps_offset=1, timestep_spacing="linspace", **SD_BETAS)
    for steps in (1, 2, 7, 333, 999, 1000):
        sigmas = sigmas_for(config, steps, grid)
        assert sigmas.shape == (steps + 1,) and sigmas.dtype == np.float32 and sigmas[-1] == 0
        assert (np.diff(sigmas) <= 0).all() and np.isfinite(sigmas).all()
        if grid != "leading":
            assert sigmas[0] == schedule_for(config).sigmas[-1]


def test_a_grid_by_name_is_the_one_that_the_config_would_ask_for():
    plain = read("EulerDiscreteScheduler", timestep_spacing="trailing")
    for grid in ("karras", "exponential"):
        asked = read("EulerDiscreteScheduler", timestep_spacing="trailing", **{f"use_{grid}_sigmas": True})
        np.testing.assert_array_equal(sigmas_for(plain, 9, grid), sigmas_for(asked, 9))
        np.testing.assert_array_equal(sigmas_for(plain, 9), sigmas_for(asked, 9, "trailing"))
    with pytest.raises(UserError, match="did you mean karras"):
        sigmas_for(plain, 9, "karas")
    with pytest.raises(UserError, match="a flow model has one grid"):
        sigmas_for(read("FlowMatchEulerDiscreteScheduler"), 9, "karras")


def test_ten_aligned_steps_are_those_of_diffusers():
    config = read("EulerDiscreteScheduler", **SD_BETAS)
    to_t = schedule_for(config).sigma_to_t
    for xl, name in ((False, "StableDiffusion"), (True, "StableDiffusionXL")):
        sigmas = sigmas_for(config, 10, "ays", xl=xl)
        np.testing.assert_allclose(sigmas, AysSchedules[f"{name}Sigmas"], atol=0.03, rtol=0.02)
        t = np.round(np.asarray(to_t(jnp.asarray(sigmas[:-1]))))
        np.testing.assert_array_equal(t, AysSchedules[f"{name}Timesteps"])
        twice = sigmas_for(config, 20, "ays", xl=xl)
        np.testing.assert_allclose(twice[:-1:2], sigmas[:-1], rtol=1e-6)
        np.testing.assert_allclose(twice[1:-2:2], np.sqrt(sigmas[:-2] * sigmas[1:-1]), rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}]
)
def test_steps_aligned_to_other_noise_levels_are_refused(options):
    with pytest.raises(UserError, match="grid='ays' is for the noise levels of Stable Diffusion 1, 2 and XL"):
        sigmas_for(read(**SD_BETAS | options), 10, "ays")


def test_sgm_uniform_is_close_to_trailing():
    """Evenly spaced from the noisiest timestep on, the cleanest left out."""
    config = read(timestep_spacing="trailing")
    to_t = schedule_for(config).sigma_to_t
    for steps in (4, 7, 30):
        sigmas = sigmas_for(config, steps, "sgm_uniform")
        t = np.asarray(to_t(jnp.asarray(sigmas[:-1])))
        np.testing.assert_allclose(t, 999 - np.arange(steps) * 999 / steps, atol=1e-2)
        away = t - np.asarray(to_t(jnp.asarray(sigmas_for(config, steps)[:-1])))
        assert 0.1 < np.abs(away).max() < 1.5


def test_karras_is_uniform_in_the_seventh_root():
    roots = karras(9, 0.03, 15.0) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), (0.03 ** (1 / 7) - 15 ** (1 / 7)) / 8)


def test_zero_terminal_snr_shifts_the_root_and_ends_at_the_cap():
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    before = np.sqrt(alphas_cumprod(read(**options)))
    after = np.sqrt(alphas_cumprod(read(**options, rescale_betas_zero_snr=True)))
    assert after[-1] == 1 / SIGMA_CAP
    assert after[0] == pytest.approx(before[0])
    slope = np.diff(after[:-1]) / np.diff(before[:-1])  # affine in the root
    np.testing.assert_allclose(slope, slope[0], rtol=1e-6)


CONFIGS = {
    "vp": read(),
    "zero snr": read(rescale_betas_zero_snr=True),
    "flow": read("FlowMatchEulerDiscreteScheduler"),
    "shifted flow": read("FlowMatchEulerDiscreteScheduler", shift=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_timesteps_and_sigmas_are_inverse(name):
    schedule = schedule_for(CONFIGS[name])
    to_t, to_sigma = jax.jit(schedule.sigma_to_t), jax.jit(schedule.t_to_sigma)
    t = jnp.linspace(1.0, 990.0, 173)
    np.testing.assert_allclose(to_t(to_sigma(t)), t, rtol=1e-4)
    between = jnp.asarray(np.exp(np.linspace(np.log(0.05), np.log(50), 99)), jnp.float32)
    between = jnp.minimum(between, schedule.sigmas[-2])
    np.testing.assert_allclose(to_sigma(to_t(between)), between, rtol=1e-4)


def test_timesteps_are_exact_on_the_table_and_held_beyond_it():
    schedule = schedule_for(read())
    np.testing.assert_array_equal(jax.jit(schedule.sigma_to_t)(jnp.asarray(schedule.sigmas)), np.arange(1000))
    np.testing.assert_array_equal(schedule.sigma_to_t(jnp.asarray([0.0, 1e9])), [0, 999])
    halfway = np.sqrt(schedule.sigmas[500] * schedule.sigmas[501])
    assert float(schedule.sigma_to_t(jnp.asarray(halfway))) == pytest.approx(500.5, abs=1e-3)
    whole = dataclasses.replace(schedule, whole=True)
    assert float(whole.sigma_to_t(jnp.asarray(1.001 * halfway))) == 501


def test_a_flow_counts_its_timesteps_from_clean_to_pure_noise():
    schedule = schedule_for(CONFIGS["flow"])
    np.testing.assert_allclose(schedule.sigma_to_t(jnp.asarray([0.0, 1.0, 3.0])), [0, 500, 750])
    np.testing.assert_allclose(schedule.sigmas[[499, 749]], [1.0, 3.0], rtol=1e-6)
    assert schedule.sigmas[-1] == SIGMA_CAP == float(schedule.t_to_sigma(jnp.asarray(1000.0)))


def test_initial_scale_is_the_spread_of_x_where_the_latents_keep_theirs():
    """Unit noise must reach the network as unit noise: c_in * initial_scale = 1."""
    for name, config in CONFIGS.items():
        sigmas = sigmas_for(config, 10)
        c_in = 1 / (1 + sigmas[0]) if config.is_flow else 1 / np.sqrt(1 + float(sigmas[0]) ** 2)
        assert c_in * initial_scale(config, sigmas) == pytest.approx(1), name


def test_a_schedule_is_a_pytree_that_jit_takes():
    schedule = schedule_for(CONFIGS["flow"])
    t = jax.jit(lambda schedule, sigma: schedule.sigma_to_t(sigma))(schedule, jnp.ones(2))
    np.testing.assert_allclose(t, 500)


SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "skip_prk_steps": True,
}
EDM = {"_class_name": "EDMEulerScheduler"}


@pytest.mark.parametrize(
    ("options", "other", "expected"),
    [
        (SD15, SD15 | {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, True),
        (SD15, SD15 | {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}, True),
        (SD15, SD15 | {"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, False),
        (SD15, SD15 | {"prediction_type": "v_prediction"}, False),
        (SD15, SD15 | {"beta_end": 0.02}, False),
        (SD15, SD15 | {"rescale_betas_zero_snr": True}, False),
        (SD15, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, False),
        (SD15, EDM, False),
        (EDM, {"_class_name": "EDMDPMSolverMultistepScheduler"}, True),
        (EDM, EDM | {"sigma_data": 1.0}, False),
    ],
)
def test_schedulers_are_alike_where_they_differ_in_their_grids_alone(options, other, expected):
    one, two = (SchedulerConfig.from_json(each, "a test") for each in (options, other))
    assert alike(one, two) is alike(two, one) is expected
    assert alike(one, one) and alike(two, two)
