"""Deep features, kept over some steps (Ma et al. 2024, DeepCache).

From step to step the lower levels of a U-Net say much the same, and they are most of the work. So they are
computed at some steps, which are an argument, and at the others what they last said goes into the last block.
The levels of the full size, which see the noise, are computed at every step.

A sampler calls the network once a step and knows nothing of this: `keeping` makes one of it whose state is
its own and what the network keeps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from engine.diffusion.samplers import Sampler
from engine.diffusion.steps import Carry, Index, InitStep, Trace
from engine.types import Latents, Sigma

# Of each picture, of each pass of guidance (none; uncond, cond; ...): the deep feature.
Kept = Float[Array, "B R H W D"]

# (x, sigma, i, kept) -> D(x, sigma), kept: a denoiser that keeps something from step to step. i: the step's
# number; kept: any tree of arrays of which B is the first axis, as small as ().
KeepingDenoise = Callable[[Latents, Sigma, Index, Any], tuple[Latents, Any]]


class State(NamedTuple):
    """Between two steps."""

    carry: Carry  # the sampler's
    kept: Any  # the network's


class Recall:
    """What stands between a U-Net and its lower levels in one call; `kept` is what is kept after it."""

    def __init__(self, kept: Kept, fresh: Bool[Array, ""] | bool):
        """fresh: whether they are computed; may be traced."""
        self.kept, self.fresh = kept, fresh

    def __call__(self, compute: Callable[[], Float[Array, "BR H W D"]]) -> Float[Array, "BR H W D"]:
        last = self.kept.reshape(-1, *self.kept.shape[2:])
        if isinstance(self.fresh, bool):
            feature = compute() if self.fresh else last
        else:
            feature = jax.lax.cond(self.fresh, compute, lambda: last)
        self.kept = feature.reshape(self.kept.shape)
        return feature


def either(call: Callable[[Recall], Array], recall: Recall) -> Array:
    """`call` of what stands in for `recall`, in one branch of the program for each of the two kinds of steps.

    For what is done before the U-Net is called, and is for its lower levels.
    """

    def branch(fresh: bool) -> tuple[Array, Kept]:
        own = Recall(recall.kept, fresh)
        return call(own), own.kept

    out, recall.kept = jax.lax.cond(recall.fresh, lambda: branch(True), lambda: branch(False))
    return out


def keeping(
    sampler: Sampler, denoise: KeepingDenoise, keep: Callable[[Latents], Any], *args: Any, **options: Any
) -> InitStep:
    """A sampler with a denoiser that keeps something: init, step over State.

    Args:
      keep: x -> what is kept before there is anything.
      args, options: of the sampler's `make`, behind its denoiser.
    """

    def init(x: Latents) -> State:
        init, _ = sampler.make(lambda x, sigma: denoise(x, sigma, 0, keep(x))[0], *args, **options)
        return State(init(x), keep(x))

    def step(state: State, i: Index) -> tuple[State, Trace]:
        after = [state.kept]

        def remembering(x: Latents, sigma: Sigma) -> Latents:
            D, after[0] = denoise(x, sigma, i, state.kept)
            return D

        _, own_step = sampler.make(remembering, *args, **options)
        carry, trace = own_step(state.carry, i)
        return State(carry, after[0]), trace

    return init, step
