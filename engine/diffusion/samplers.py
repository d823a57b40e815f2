"""Samplers: from noise to an image, step by step, by calling denoise(x, sigma) -> x0.

All work in the scaling x = x0 + sigma eps, where the probability flow is dx / dsigma = (x - D) / sigma
(Karras et al. 2022, equation 1 with s(t) = 1). A sampler is a plain function

    init, step = euler(denoise, sigmas, keys)

    carry = init(x)                              x and what the sampler remembers
    carry, trace = step(carry, i)                i: number of the step, may be traced

so that a run is one `lax.scan` (`sample`), or several that carry on exactly where the last one ended
(`start`, `sample_segment`). Every step calls the network once. Most samplers take one step an interval of the
grid; those that also look at its middle or its end take two, and pndm one more in all (`SAMPLERS`). The
functions themselves are in singlestep.py, multistep.py and consistency.py.

Where the papers write x + (sigma' - sigma) d, the code writes D + (sigma' / sigma) (x - D), which is the same
but does not lose x0 to rounding where x is a thousand times larger. It is also exact at sigma' = 0: D.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engine.config import nearest
from engine.diffusion.consistency import lcm, tcd
from engine.diffusion.multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms, pndm, unipc
from engine.diffusion.singlestep import (
    ddim,
    ddpm,
    dpm_2,
    dpm_2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
)
from engine.diffusion.steps import Carry as Carry
from engine.diffusion.steps import Index, InitStep, Sigmas, Trace
from engine.types import Denoise, Keys, Latents, UserError


class Sampler(NamedTuple):
    """An entry of SAMPLERS."""

    make: Callable[..., InitStep]  # (denoise, sigmas, keys, **options) -> init, step
    steps: Callable[[int], int] = lambda n: n  # number of steps, and so of network calls, for n intervals
    stochastic: bool = False  # whether it adds noise with its default options
    options: tuple[str, ...] = ()  # keyword arguments of `make`; all but `schedule` are static

    def steps_before(self, n: int) -> int:
        """Those of a longer run that take its first n intervals."""
        return self.steps(n + 1) - 1


def _twice(n: int) -> int:
    """Steps of the samplers that take two an interval, and one for the last."""
    return 2 * n - 1


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, options=("eta",)),
    "ddpm": Sampler(ddpm, stochastic=True),
    "euler": Sampler(euler, options=("s_churn", "s_noise")),
    "euler_ancestral": Sampler(euler_ancestral, stochastic=True, options=("eta",)),
    "heun": Sampler(heun, _twice, options=("s_churn", "s_noise")),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, stochastic=True),
    "pndm": Sampler(pndm, lambda n: n + 1 if n > 1 else 1),
    "lms": Sampler(lms, options=("order",)),
    "deis": Sampler(deis, options=("solver_order",)),
    "unipc": Sampler(unipc, options=("solver_order", "solver_type")),
    "dpm_2": Sampler(dpm_2, _twice),
    "dpm_2_ancestral": Sampler(dpm_2_ancestral, _twice, stochastic=True, options=("eta",)),
    "lcm": Sampler(lcm, stochastic=True, options=("schedule", "timestep_scaling")),
    "tcd": Sampler(tcd, stochastic=True, options=("eta", "schedule")),
    "dpmpp_2s_ancestral": Sampler(dpmpp_2s_ancestral, _twice, stochastic=True, options=("eta",)),
    "dpmpp_sde": Sampler(dpmpp_sde, _twice, stochastic=True, options=("eta",)),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, stochastic=True, options=("eta",)),
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
    sampler: str, denoise: Denoise, x: Latents, sigmas: Sigmas, keys: Keys, **options: Any
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


def start(sampler: str, denoise: Denoise, x: Latents, sigmas: Sigmas, keys: Keys, **options: Any) -> Carry:
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
    **options: Any,
) -> tuple[Carry, Trace]:
    """Steps `first` (may be traced) to `first + steps` (static) of a run over the whole grid `sigmas`."""
    _, step = find(sampler).make(denoise, sigmas, keys, **options)
    return jax.lax.scan(step, carry, first + jnp.arange(steps))
