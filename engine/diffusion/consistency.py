"""Samplers of distilled models, which jump along the flow, to its end or not as far, and add noise again.

Their papers count time in the timesteps of the model that was distilled: `schedule` tells these. Without it,
time is sigma.
"""

import jax.numpy as jnp

from engine.diffusion.noise import step_noise
from engine.diffusion.parameterization import per_image
from engine.diffusion.schedules import Schedule
from engine.diffusion.steps import Carry, Index, InitStep, Sigmas, Trace, remembering
from engine.types import Denoise, Keys, Latents, Sigma

SIGMA_DATA = 0.5


def consistent(
    x: Latents, D: Latents, sigma: Sigma, schedule: Schedule, timestep_scaling: float = 10.0
) -> Latents:
    """The predicted x0, blended with the variance-preserving x such that f(x, 0) = x (LCM, appendix C).

    f = c_skip x / sqrt(1 + sigma^2) + c_out D, where with s = timestep_scaling * t

        c_skip = sigma_data^2 / (s^2 + sigma_data^2),    c_out = s / sqrt(s^2 + sigma_data^2)
    """
    s = timestep_scaling * schedule.sigma_to_t(sigma)
    c_skip, c_out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s / jnp.sqrt(s**2 + SIGMA_DATA**2)
    return per_image(c_skip, x) * x / per_image(jnp.sqrt(1 + sigma**2), x) + per_image(c_out, x) * D


def lcm(
    denoise: Denoise,
    sigmas: Sigmas,
    keys: Keys,
    schedule: Schedule | None = None,
    timestep_scaling: float = 10.0,
) -> InitStep:
    """Luo et al. 2023 (LCM), algorithm 3: x' = f(x, t) + sigma' z, with the network's consistency function f.

    f is the x0 that the network predicts; with a schedule, what `consistent` makes of it.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, sigma = carry.x, sigmas[i]
        f = D = denoise(x, sigma)
        if schedule is not None:
            f = consistent(x, D, sigma, schedule, timestep_scaling)
        x = f + sigmas[i + 1] * step_noise(keys, i, x.shape[1:])
        return Carry(x, ()), Trace(x, D)

    return remembering(0), step


def tcd(
    denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float = 0.3, schedule: Schedule | None = None
) -> InitStep:
    """Zheng et al. 2024 (TCD), algorithm 4: along the flow to time s = (1 - eta) t', then noise up to t'.

        x' = D + sigma_s (x - D) / sigma + sqrt(sigma'^2 - sigma_s^2) z

    eta, the paper's gamma, is 0 for DDIM and 1 for the multistep sampling of consistency models. With a
    schedule, s is a whole timestep, rounded down.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, sigma, sigma_next = carry.x, sigmas[i], sigmas[i + 1]
        D = denoise(x, sigma)
        if schedule is None:
            sigma_s = (1 - eta) * sigma_next
        else:
            s = jnp.floor((1 - eta) * schedule.sigma_to_t(sigma_next))
            sigma_s = jnp.minimum(schedule.t_to_sigma(s), sigma_next)  # below timestep 0: sigma_next itself
        x = D + sigma_s / sigma * (x - D)
        if eta > 0:
            # not below 0, which they are where a compiler rounds one of the squares of equal numbers later
            spread = jnp.sqrt(jnp.maximum(sigma_next**2 - sigma_s**2, 0))
            x += spread * step_noise(keys, i, x.shape[1:])
        return Carry(x, ()), Trace(x, D)

    return remembering(0), step
