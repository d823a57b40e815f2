"""Samplers that forget: what they know at the end of an interval of the grid is x alone."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from engine.diffusion.noise import step_noise
from engine.diffusion.steps import Carry, Index, InitStep, Scalar, Sigmas, Trace, remembering
from engine.types import Denoise, Keys, Latents


def ddim(denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float = 0.0) -> InitStep:
    """Song et al. 2021 (DDIM), equations 12 and 16: eta 0 is deterministic, 1 is DDPM.

    Divided by sqrt(alphas_cumprod), equation 12 is x' = D + sigma_down (x - D) / sigma + sigma_up z, with the
    sigma_down and sigma_up of `_ancestral`.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        D = denoise(carry.x, sigma)
        down, up = _ancestral(sigma, sigma_next, eta)
        x = D + down * (carry.x - D) / sigma
        if eta > 0:
            x += up * step_noise(keys, i, x.shape[1:])
        return Carry(x, ()), Trace(x, D)

    return remembering(0), step


def ddpm(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """Ho et al. 2020, algorithm 2, with the posterior variance of equation 7: DDIM with eta 1."""
    return ddim(denoise, sigmas, keys, eta=1.0)


def _ancestral(sigma: Scalar, sigma_next: Scalar, eta: float) -> tuple[Scalar, Scalar]:
    """sigma_down, where the flow is followed to, and sigma_up, of the noise that then leads up to sigma'.

    sigma_up = eta sigma' sqrt(1 - sigma'^2 / sigma^2),    sigma_down^2 = sigma'^2 - sigma_up^2
    """
    up = eta * jnp.sqrt(1 - (sigma_next / sigma) ** 2)  # sigma_up / sigma_next
    return sigma_next * jnp.sqrt(1 - up**2), sigma_next * up


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


def _halfway(sigmas: Sigmas, k: Index, down: Scalar) -> tuple[Scalar, Scalar]:
    """The middle of interval k in log sigma, and how much smaller it is than sigma: sqrt(down / sigma).

    The last interval has no middle: it is one step of Euler's, with a middle of sigma for form's sake.
    """
    ratio = jnp.where(k < sigmas.shape[0] - 2, jnp.sqrt(down / sigmas[k]), 1)
    return ratio * sigmas[k], ratio


def dpm_2(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """Lu et al. 2022 (DPM-Solver), algorithm 1 (DPM-Solver-2) as k-diffusion has it: the slope of the middle.

    Two steps an interval, one for the last (Euler's). Even steps follow the slope of sigma to the middle m of
    the interval in log sigma: x_m = D + (m / sigma) (x - D). Odd ones go from sigma to sigma' with the slope
    of m, x' = x + (sigma' - sigma) (x_m - D_m) / m, which is, with x written in x_m and D,

        x' = D_m + (sigma' / m) (x_m - D_m) + (sigma / m - 1) (D_m - D)
    """
    return dpm_2_ancestral(denoise, sigmas, keys, eta=0.0)


def dpm_2_ancestral(denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float = 1.0) -> InitStep:
    """dpm_2 to sigma_down, then noise up to sigma' (k-diffusion)."""
    return _midpoint(denoise, sigmas, keys, eta, lambda ratio: 1 / ratio - 1)


def dpmpp_2s_ancestral(denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float = 1.0) -> InitStep:
    """Lu et al. 2022 (DPM-Solver++), algorithm 1 (2S) with r = 1/2, to sigma_down; then noise (k-diffusion).

    As dpm_2, but with the D of the middle m, not its slope: x' = D_m + (sigma_down / sigma) (x - D_m). With x
    written in x_m and D, and m / sigma = sigma_down / m,

        x' = D_m + (sigma_down / m) (x_m - D_m) + (m / sigma) (1 - m / sigma) (D_m - D)
    """
    return _midpoint(denoise, sigmas, keys, eta, lambda ratio: ratio * (1 - ratio))


def _midpoint(
    denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float, weight: Callable[[Scalar], Scalar]
) -> InitStep:
    """Euler to the middle m, then x' = D_m + (sigma_down / m) (x_m - D_m) + weight(m / sigma) (D_m - D)."""

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        k, first = i // 2, i % 2 == 0
        down, up = _ancestral(sigmas[k], sigmas[k + 1], eta)
        middle, ratio = _halfway(sigmas, k, down)
        last = k == sigmas.shape[0] - 2
        x, (D_before,) = carry.x, carry.memory
        D = denoise(x, jnp.where(first, sigmas[k], middle))
        x = D + jnp.where(last, down / sigmas[k], ratio) * (x - D)  # sigma_down / m is m / sigma
        x += jnp.where(first, 0, weight(ratio)) * (D - D_before)
        if eta > 0:
            x += jnp.where(first & ~last, 0, up) * step_noise(keys, i, x.shape[1:])
        return Carry(x, (D,)), Trace(x, D)

    return remembering(1), step


def dpmpp_sde(denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float = 1.0) -> InitStep:
    """DPM-Solver++(2S) for the reverse SDE, with r = 1/2 (k-diffusion's `sample_dpmpp_sde`).

    Two steps an interval, one for the last (Euler's). Even steps go to the middle m of the interval in log
    sigma, as euler_ancestral would: down, then up by noise z. Odd ones go all the way from sigma to sigma'
    likewise, with the D of the middle. Their noise is that of one Brownian path in sigma, which went by m:

        z' = [sqrt(sigma - m) z + sqrt(m - sigma') z_new] / sqrt(sigma - sigma')
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        k, first = i // 2, i % 2 == 0
        sigma, sigma_next, (x,) = sigmas[k], sigmas[k + 1], carry.memory
        x = jnp.where(first, carry.x, x)  # at sigma
        middle, _ = _halfway(sigmas, k, sigma_next)
        last = k == sigmas.shape[0] - 2
        D = denoise(carry.x, jnp.where(first, sigma, middle))
        down, up = _ancestral(sigma, jnp.where(first & ~last, middle, sigma_next), eta)
        x_next = D + down / sigma * (x - D)
        if eta > 0:
            z = step_noise(keys, i, x.shape[1:])
            part = (sigma - middle) / jnp.where(sigma > sigma_next, sigma - sigma_next, 1)
            path = jnp.sqrt(part) * step_noise(keys, i - 1, x.shape[1:]) + jnp.sqrt(1 - part) * z
            x_next += up * jnp.where(first, z, path)
        return Carry(x_next, (x,)), Trace(x_next, D)

    return remembering(1), step
