"""Exponential moving averages of parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from engine.types import Params


def update(ema_params: Params, params: Params, step: Int[Array, ""], decay: float) -> Params:
    """decay * ema + (1 - decay) * params; short averages first: decay is at most (1 + step) / (10 + step)."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema_params, params)
