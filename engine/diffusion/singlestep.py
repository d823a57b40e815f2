"""Samplers that forget: what they know at the end of an interval of the grid is x alone."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from engine.diffusion.noise import step_noise
from engine.diffusion.steps import Carry, Index, InitStep, Sigmas, Trace, remembering
from engine.types import Denoise, Keys, Latents


def ddim(denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float = 0.0) -> InitStep:
    """Song et al. 2021 (DDIM), equations 12 and 16: eta 0 is deterministic, 1 is DDPM.

    Divided by sqrt(alphas_cumprod), equation 12 is x' = D + sigma_down (x - D) / sigma + sigma_up z, with

        sigma_up = eta sigma' sqrt(1 - sigma'^2 / sigma^2),    sigma_down^2 = sigma'^2 - sigma_up^2
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        D = denoise(carry.x, sigma)
        up = eta * jnp.sqrt(1 - (sigma_next / sigma) ** 2)  # sigma_up / sigma_next
        x = D + sigma_next * jnp.sqrt(1 - up**2) * (carry.x - D) / sigma
        if eta > 0:
            x += sigma_next * up * step_noise(keys, i, x.shape[1:])
        return Carry(x, ()), Trace(x, D)

    return remembering(0), step


def ddpm(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """Ho et al. 2020, algorithm 2, with the posterior variance of equation 7: DDIM with eta 1."""
    return ddim(denoise, sigmas, keys, eta=1.0)


def euler_ancestral(denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float = 1.0) -> InitStep:
    """Euler to sigma_down, then noise up to sigma' (k-diffusion). In this scaling that is DDIM with this eta.

    Its grid is what sets it apart from ddpm: see `schedules.sigmas_for`.
    """
    return ddim(denoise, sigmas, keys, eta)


def euler(
    denoise: Denoise, sigmas: Sigmas, keys: Keys, s_churn: float = 0.0, s_noise: float = 1.0
) -> InitStep:
    """Karras et al. 2022, algorithm 2 without its second-order correction (lines 9 to 11)."""

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, sigma = _churned(carry.x, sigmas, i, keys, s_churn, s_noise)
        D = denoise(x, sigma)
        x = D + sigmas[i + 1] / sigma * (x - D)
        return Carry(x, ()), Trace(x, D)

    return remembering(0), step


def heun(
    denoise: Denoise, sigmas: Sigmas, keys: Keys, s_churn: float = 0.0, s_noise: float = 1.0
) -> InitStep:
    """Karras et al. 2022, algorithm 2, second order. Two steps an interval, one for the last (Euler's).

    Even steps predict x1 = D + (sigma' / sigma) (x - D), the Euler step. Odd ones evaluate D1 = D(x1, sigma')
    and correct: line 11, x + (sigma' - sigma) [(x - D) / sigma + (x1 - D1) / sigma'] / 2, is, with x written
    in x1 and D,

        x1 + (sigma - sigma') / (2 sigma') (D1 - D)
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        k, predict = i // 2, i % 2 == 0
        x_hat, sigma = _churned(carry.x, sigmas, k, keys, s_churn, s_noise)
        x, (D_before,) = jnp.where(predict, x_hat, carry.x), carry.memory
        sigma_next = sigmas[k + 1]
        D = denoise(x, jnp.where(predict, sigma, sigma_next))
        ratio = sigma_next / sigma
        predicted = D + ratio * (x - D)
        corrected = x + (1 - ratio) / (2 * jnp.where(predict, 1, ratio)) * (D - D_before)
        x = jnp.where(predict, predicted, corrected)
        return Carry(x, (D,)), Trace(x, D)

    return remembering(1), step


def _churned(
    x: Latents, sigmas: Sigmas, i: Index, keys: Keys, s_churn: float, s_noise: float
) -> tuple[Latents, Float[Array, ""]]:
    """x with noise added, up to sigma_hat: lines 4 to 6 of algorithm 2."""
    if s_churn == 0:
        return x, sigmas[i]
    gamma = min(s_churn / (sigmas.shape[0] - 1), 2**0.5 - 1)
    noise = s_noise * step_noise(keys, i, x.shape[1:])
    return x + sigmas[i] * (gamma * (2 + gamma)) ** 0.5 * noise, sigmas[i] * (1 + gamma)
