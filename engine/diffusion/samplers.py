"""Samplers: from noise to an image, step by step, by calling denoise(x, sigma) -> x0.

All work in the scaling x = x0 + sigma eps, where the probability flow is dx / dsigma = (x - D) / sigma
(Karras et al. 2022, equation 1 with s(t) = 1). A sampler is a plain function

    init, step = euler(denoise, sigmas, keys)

    carry = init(x)                              x and what the sampler remembers
    carry, trace = step(carry, i)                i: number of the step, may be traced

so that a run is one `lax.scan` (`sample`), or several that carry on exactly where the last one ended
(`start`, `sample_segment`). Every step calls the network once. Most samplers take one step an interval of the
grid; heun and pndm take more (`SAMPLERS`).

Where the papers write x + (sigma' - sigma) d, the code writes D + (sigma' / sigma) (x - D), which is the same
but does not lose x0 to rounding where x is a thousand times larger. It is also exact at sigma' = 0: D.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engine.config import nearest
from engine.diffusion.noise import step_noise
from engine.diffusion.parameterization import at_least_float32
from engine.types import Denoise, Keys, Latents, UserError

Sigmas = Float[Array, "n_plus_1"]  # n intervals, falling; the last may be 0
Index = int | Int[Array, ""]


class Carry(NamedTuple):
    """The state between two steps."""

    x: Latents
    memory: tuple[Latents, ...]


class Trace(NamedTuple):
    """What one step did."""

    x: Latents  # after the step
    denoised: Latents  # the D(x, sigma) that it was made with


InitStep = tuple[Callable[[Latents], Carry], Callable[[Carry, Index], tuple[Carry, Trace]]]


def _remembering(count: int) -> Callable[[Latents], Carry]:
    """The init of a sampler whose memory is `count` arrays like x, all zeros at first."""

    def init(x: Latents) -> Carry:
        x = at_least_float32(x)
        return Carry(x, (jnp.zeros_like(x),) * count)

    return init


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

    return _remembering(0), step


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

    return _remembering(0), step


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

    return _remembering(1), step


def _churned(
    x: Latents, sigmas: Sigmas, i: Index, keys: Keys, s_churn: float, s_noise: float
) -> tuple[Latents, Float[Array, ""]]:
    """x with noise added, up to sigma_hat: lines 4 to 6 of algorithm 2."""
    if s_churn == 0:
        return x, sigmas[i]
    gamma = min(s_churn / (sigmas.shape[0] - 1), 2**0.5 - 1)
    noise = s_noise * step_noise(keys, i, x.shape[1:])
    return x + sigmas[i] * (gamma * (2 + gamma)) ** 0.5 * noise, sigmas[i] * (1 + gamma)


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

    return _remembering(1), step


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

    return _remembering(1), step


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

    return _remembering(3), step


class Sampler(NamedTuple):
    """An entry of SAMPLERS."""

    make: Callable[..., InitStep]  # (denoise, sigmas, keys, **options) -> init, step
    steps: Callable[[int], int] = lambda n: n  # number of steps, and so of network calls, for n intervals
    stochastic: bool = False  # whether it adds noise with its default options
    options: tuple[str, ...] = ()  # keyword arguments of `make`, floats, static


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, options=("eta",)),
    "ddpm": Sampler(ddpm, stochastic=True),
    "euler": Sampler(euler, options=("s_churn", "s_noise")),
    "euler_ancestral": Sampler(euler_ancestral, stochastic=True, options=("eta",)),
    "heun": Sampler(heun, lambda n: 2 * n - 1, options=("s_churn", "s_noise")),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, stochastic=True),
    "pndm": Sampler(pndm, lambda n: n + 1 if n > 1 else 1),
}


def find(sampler: str) -> Sampler:
    """The sampler of that name.

    Raises:
      UserError: there is none.
    """
    if sampler not in SAMPLERS:
        near = nearest(sampler, SAMPLERS)
        raise UserError(f"sampler={sampler!r} is unknown{near}; write one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]


def sample(
    sampler: str, denoise: Denoise, x: Latents, sigmas: Sigmas, keys: Keys, **options: float
) -> tuple[Latents, Trace]:
    """Runs a sampler over the whole grid.

    Args:
      x: noise, or a noised image, at the level sigmas[0].
      keys: one an image, for the samplers that add noise.
      options: those of the sampler, see SAMPLERS.

    Returns:
      x at the level sigmas[-1], float32, and the trace of all steps, stacked along a new first axis. Where
      the trace is not used, jit does not compute it.
    """
    steps = find(sampler).steps(sigmas.shape[0] - 1)
    carry = start(sampler, denoise, x, sigmas, keys, **options)
    carry, trace = sample_segment(sampler, denoise, carry, sigmas, keys, 0, steps, **options)
    return carry.x, trace


def start(sampler: str, denoise: Denoise, x: Latents, sigmas: Sigmas, keys: Keys, **options: float) -> Carry:
    """The state before the first step, for `sample_segment`."""
    init, _ = find(sampler).make(denoise, sigmas, keys, **options)
    return init(x)


def sample_segment(
    sampler: str,
    denoise: Denoise,
    carry: Carry,
    sigmas: Sigmas,
    keys: Keys,
    first: Index,
    steps: int,
    **options: float,
) -> tuple[Carry, Trace]:
    """Steps `first` (may be traced) to `first + steps` (static) of a run over the whole grid `sigmas`."""
    _, step = find(sampler).make(denoise, sigmas, keys, **options)
    return jax.lax.scan(step, carry, first + jnp.arange(steps))
