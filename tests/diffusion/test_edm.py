"""Models that learned as Karras et al. 2022 say, without a table of noise levels: Playground 2.5 and CosXL.

Trajectories and grids are held against the originals in tests/parity/test_schedulers.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import ObjectiveConfig
from engine.diffusion.losses import check_terminal
from engine.diffusion.noise import image_keys
from engine.diffusion.parameterization import denoiser
from engine.diffusion.samplers import SAMPLERS, sample
from engine.diffusion.schedules import (
    SchedulerConfig,
    for_sampler,
    initial_scale,
    intervals_above,
    sampler_name,
    sampler_options,
    schedule_for,
    sigmas_for,
)
from engine.types import UserError

EULER, DPM = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"
PLAYGROUND = {  # as published
    "_class_name": DPM,
    "_diffusers_version": "0.27.0.dev0",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sample_max_value": 1.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
}


def read(class_name: str = EULER, **options) -> SchedulerConfig:
    return SchedulerConfig.from_json({"_class_name": class_name, **options}, "s.json")


def test_a_published_config_is_read_and_written():
    config = SchedulerConfig.from_json(PLAYGROUND, "s.json")
    assert config.is_edm and sampler_name(config) == "dpmpp_2m"
    assert config == SchedulerConfig.from_json(config.to_json(), "again")
    assert not {"beta_start", "timestep_spacing", "steps_offset"} & set(config.to_json())
    assert sampler_name(read(DPM, algorithm_type="sde-dpmsolver++")) == "dpmpp_2m_sde"


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"lcm", "tcd"}))
def test_every_sampler_draws_with_one(sampler):
    """Data of spread sigma_data around 0, whose perfect network is 0: samples have that spread."""
    config = for_sampler(read(sigma_data=0.7), sampler)
    sigmas, keys = sigmas_for(config, 150), image_keys(5, range(6))
    x = initial_scale(config, sigmas) * np.random.default_rng(0).standard_normal((6, 8, 8, 4), np.float32)
    denoise = denoiser(lambda x, t: jnp.zeros_like(x), config.prediction_type, schedule_for(config))
    last, _ = sample(sampler, denoise, jnp.asarray(x), jnp.asarray(sigmas), keys, **sampler_options(config))
    assert np.isfinite(last).all()
    assert float(jnp.std(last)) == pytest.approx(0.7, rel=0.1)


def test_the_network_sees_its_own_time_and_unit_variance():
    seen = {}

    def apply(x, t):
        return seen.update(x=x, t=t) or x

    config = read(sigma_data=0.5)
    x0 = 0.5 * np.random.default_rng(0).standard_normal((2, 64, 64, 4), np.float32)
    eps = np.random.default_rng(1).standard_normal(x0.shape, np.float32)
    sigma = jnp.asarray([0.1, 40.0])
    denoise = denoiser(apply, "epsilon", schedule_for(config))
    denoise(jnp.asarray(x0 + np.asarray(sigma)[:, None, None, None] * eps), sigma)
    np.testing.assert_allclose(seen["t"], np.log([0.1, 40.0]) / 4, rtol=1e-6)
    np.testing.assert_allclose(seen["x"].std((1, 2, 3)), [1, 1], rtol=0.02)


def test_its_grid_is_of_its_own_ends():
    config = read(sigma_max=120.0, sigma_min=0.01)
    for grid, middle in ((None, 4.763), ("karras", 4.763), ("exponential", 120**0.5 * 0.01**0.5)):
        sigmas = sigmas_for(config, 3, grid)
        np.testing.assert_allclose(sigmas, [120, sigmas[1], 0.01, 0], rtol=1e-5)
        assert sigmas[1] == pytest.approx(middle, rel=1e-3)
    assert list(sigmas_for(config, 1)) == [120, 0]
    assert sigmas_for(read(final_sigmas_type="sigma_min"), 4)[-1] == np.float32(0.002)
    with pytest.raises(UserError, match=r"supported: karras, exponential$"):
        sigmas_for(config, 10, "trailing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type='sample' is not supported"),
        ({"sigma_schedule": "linear"}, "sigma_schedule='linear' is not supported"),
        ({"sigma_min": 0.0}, "sigma_min must be above 0"),
        ({"sigma_max": 0.001}, "sigma_max above sigma_min"),
        ({"sigma_data": 0.0}, "sigma_data and rho must be above 0"),
        ({"thresholding": True}, "thresholding"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=rf"^s\.json: .*{message}"):
        read(DPM, **options)


def test_what_it_does_not_do():
    config = read()
    for sampler in ("lcm", "tcd"):
        with pytest.raises(UserError, match=rf"sampler='{sampler}' is for distilled models.* as euler$"):
            for_sampler(config, sampler)
    with pytest.raises(UserError, match="has no refiner"):
        intervals_above(config, sigmas_for(config, 10), 0.8)
    with pytest.raises(UserError, match="is not trained here"):
        check_terminal(config, ObjectiveConfig())
