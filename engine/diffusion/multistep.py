"""Samplers that remember: each step uses what the network said in the steps before it."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from engine.diffusion.noise import step_noise
from engine.diffusion.steps import Carry, Index, InitStep, Sigmas, Trace, remembering
from engine.types import Denoise, Keys


def dpmpp_2m(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, second order, multistep.

    With lambda = -log sigma and h = log(sigma / sigma'), x' = exp(-h) x + (1 - exp(-h)) D_i.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, sigma, sigma_next = carry.x, sigmas[i], sigmas[i + 1]
        D = denoise(x, sigma)
        D_i = D + _slope(sigmas, i) * (D - carry.memory[0])
        x = D_i + sigma_next / sigma * (x - D_i)
        return Carry(x, (D,)), Trace(x, D)

    return remembering(1), step


def dpmpp_2m_sde(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """The same for the reverse SDE: x' = exp(-2h) x + (1 - exp(-2h)) D_i + sigma' sqrt(1 - exp(-2h)) z.

    Lu et al. 2022, appendix: SDE-DPM-Solver++(2M); at first order it is DDPM.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, ratio = carry.x, sigmas[i + 1] / sigmas[i]
        D = denoise(x, sigmas[i])
        D_i = D + _slope(sigmas, i) * (D - carry.memory[0])
        noise = step_noise(keys, i, x.shape[1:])
        x = D_i + ratio**2 * (x - D_i) + sigmas[i + 1] * jnp.sqrt(1 - ratio**2) * noise
        return Carry(x, (D,)), Trace(x, D)

    return remembering(1), step


def _slope(sigmas: Sigmas, i: Index) -> Float[Array, ""]:
    """1 / (2 r) = h / (2 h_before): how far DPM-Solver++(2M) extrapolates D to the middle of the step.

    0, which makes the step first order, at the first step; at the last if it ends at sigma 0 (where h is
    infinite) or the run is shorter than 15 steps (diffusers' `lower_order_final`); after a step of no length.
    """
    n = sigmas.shape[0] - 1
    before, sigma, after = sigmas[jnp.maximum(i - 1, 0)], sigmas[i], sigmas[i + 1]
    second_order = (before > sigma) & (after > 0) & ((i < n - 1) | (n >= 15))
    h_before = jnp.log(jnp.where(second_order, before / sigma, 2))
    h = jnp.log(jnp.where(second_order, sigma / after, 1))
    return h / (2 * h_before)


# Rows: the first step, its correction, and two, three, four past slopes; columns: newest slope first.
PLMS = (
    (1, 0, 0, 0),
    (1 / 2, -1 / 2, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """Liu et al. 2022 (PNDM), equations 9 and 12: Adams-Bashforth on eps, started without Runge-Kutta (PLMS).

    Equation 9, its transfer step, is x' = x + (sigma' - sigma) eps in this scaling. The first interval takes
    two steps: to its end with the slope eps_0 of its start, then again with the mean of eps_0 and eps_1 (the
    slope there), which adds (sigma' - sigma) (eps_1 - eps_0) / 2. eps_1 is then forgotten: step 2 evaluates
    it anew. From then on step i goes from sigma_{i-1} to sigma_i.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, k = carry.x, jnp.maximum(i - 1, 0)
        sigma = jnp.where(i == 1, sigmas[1], sigmas[k])
        D = denoise(x, sigma)
        eps = ((x - D) / sigma, *carry.memory)
        weights = jnp.asarray(PLMS, x.dtype)[jnp.minimum(i, 4)]
        x += (sigmas[k + 1] - sigmas[k]) * sum(w * e for w, e in zip(weights, eps, strict=True))
        memory = tuple(jnp.where(i == 1, old, new) for old, new in zip(eps[1:], eps[:3], strict=True))
        return Carry(x, memory), Trace(x, D)

    return remembering(3), step
