"""What every sampler is made of: the state that it carries from step to step, and the trace it leaves."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engine.diffusion.parameterization import at_least_float32
from engine.types import Latents

Sigmas = Float[Array, "n_plus_1"]  # n intervals, falling; the last may be 0
Index = int | Int[Array, ""]
Scalar = Float[Array, ""]


class Carry(NamedTuple):
    """The state between two steps."""

    x: Latents
    memory: tuple[Latents, ...]


class Trace(NamedTuple):
    """What one step did."""

    x: Latents  # after the step
    denoised: Latents  # the D(x, sigma) that it was made with


InitStep = tuple[Callable[[Latents], Carry], Callable[[Carry, Index], tuple[Carry, Trace]]]


def remembering(count: int) -> Callable[[Latents], Carry]:
    """The init of a sampler whose memory is `count` arrays like x, all zeros at first."""

    def init(x: Latents) -> Carry:
        x = at_least_float32(x)
        return Carry(x, (jnp.zeros_like(x),) * count)

    return init
