"""A run of a sampler in parts: how long each is, and which stages of it are shown."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from engine.diffusion.samplers import Trace

Stages = Float[np.ndarray, "B N h w C"]


def segment_length(steps: int) -> int:
    """Steps in one compiled segment: a divisor of `steps` that leaves eight segments or more, or one step."""
    return max(n for n in range(1, steps + 1) if steps % n == 0 and (n == 1 or steps // n >= 8))


def chosen_stages(
    traces: Sequence[Trace], start: jax.Array, final: jax.Array, places: Int[np.ndarray, " N"]
) -> tuple[Stages, Stages]:
    """The stages in some places on the way: 0 is the static, the number of steps the picture.

    Args:
      traces: of all segments, (B steps h w C).
      start, final: latents (B h w C).

    Returns:
      The noisy latents, at unit variance where they have more, and what the model made of them.
    """
    x = np.concatenate([np.asarray(t.x) for t in traces], axis=1)
    noisy = np.concatenate([np.asarray(start)[:, None], x[:, :-1], np.asarray(final)[:, None]], axis=1)
    denoised = np.concatenate([np.asarray(t.denoised) for t in traces], axis=1)
    denoised = np.concatenate([denoised, np.asarray(final)[:, None]], axis=1)
    spread = np.maximum(noisy.std(axis=(2, 3, 4), keepdims=True), 1.0)
    spread[:, [0, -1]] = 1.0
    return (noisy / spread)[:, places], denoised[:, places]
