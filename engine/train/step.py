"""One training step: a pure function of state, batch and key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from engine.train import ema
from engine.types import Params

Batch = dict[str, Array]
Metrics = dict[str, Array]
# (params, frozen, batch, key) -> (mean loss, metrics); `frozen` is what the loss needs and does not train
Loss = Callable[[Params, Any, Batch, Key[Array, ""]], tuple[Array, Metrics]]


class TrainState(NamedTuple):
    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState


def init(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; it owns its arrays, so that a step may reuse their memory."""
    params = jax.tree.map(jnp.array, params)
    return TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params)
    )


def train_step(loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float):
    """(state, frozen, batch, base key) -> (state, metrics), to be jitted with the state donated.

    The key of a step is fold_in(base, step): a resumed run draws what the uninterrupted one would have.
    """

    def step(state: TrainState, frozen: Any, batch: Batch, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, frozen, batch, step_key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = ema.update(state.ema_params, params, state.step, ema_decay)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return step
