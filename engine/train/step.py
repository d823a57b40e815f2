"""One training step: a pure function of state, batch and key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from engine.config import StageConfig
from engine.models.remat import remat
from engine.train import ema
from engine.types import Params

Batch = dict[str, Array]
Metrics = dict[str, Array]
# (params, frozen, batch, key) -> (mean loss, metrics); `frozen` is what the loss needs and does not train
Loss = Callable[[Params, Any, Batch, Key[Array, ""]], tuple[Array, Metrics]]
Around = Callable[[Loss], Loss]

LOSS_STEPS = 100.0  # that the average of the loss looks back on


def itself(loss: Loss) -> Loss:
    return loss


class Tally(NamedTuple):
    """What is counted beside the params."""

    loss: Float[Array, ""]  # averaged over the last 100 steps or so
    skipped: Int[Array, ""]  # steps whose gradients were not finite, in all
    skipped_in_a_row: Int[Array, ""]  # up to the last step


class TrainState(NamedTuple):
    step: Int[Array, ""]  # batches seen, those of skipped steps included
    params: Params
    ema_params: dict[str, Params]  # one for each of `ema.names`
    opt_state: optax.OptState
    tally: Tally


def init(params: Params, optimizer: optax.GradientTransformation, config: StageConfig) -> TrainState:
    """The state before the first step; it owns its arrays, so that a step may reuse their memory."""
    params = jax.tree.map(jnp.array, params)
    averages = {name: jax.tree.map(jnp.copy, params) for name in ema.shares(config)}
    tally = Tally(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return TrainState(jnp.zeros((), jnp.int32), params, averages, optimizer.init(params), tally)


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation, config: StageConfig, around: Around = itself
):
    """(state, frozen, batch, base key) -> (state, metrics), to be jitted with the state donated.

    `around` stands around the cast to the type that is computed in: it makes, in float32, the params that
    `loss` takes of those that are trained.

    The key of a step is fold_in(base, step): a resumed run draws what the uninterrupted one would have.
    Where the loss or a gradient is not finite, params, averages and optimizer stay as they are; the step
    counts, so that the next one has other data and another key.
    """
    gradients = accumulated(
        jax.value_and_grad(around(computed(loss, config)), has_aux=True), config.accumulate
    )
    shares = ema.shares(config)

    def step(state: TrainState, frozen: Any, batch: Batch, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        (value, metrics), grads = gradients(state.params, frozen, batch, step_key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        def updated():
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            averages = {
                name: ema.update(state.ema_params[name], params, share(state.step))
                for name, share in shares.items()
            }
            return params, averages, opt_state

        kept = jax.lax.cond(finite, updated, lambda: (state.params, state.ema_params, state.opt_state))
        tally = counted(state.tally, state.step, value, finite)
        metrics = {"loss": value, "grad_norm": norm, **metrics}
        metrics |= {"skipped": tally.skipped, "skipped_in_a_row": tally.skipped_in_a_row}
        return TrainState(state.step + 1, *kept, tally), metrics

    return step


def counted(tally: Tally, step: Int[Array, ""], loss: Float[Array, ""], finite: Bool[Array, ""]) -> Tally:
    """The tally after one more step: the loss's mean over the first steps, then an exponential average."""
    average = ema.update(tally.loss, loss, 1.0 / jnp.minimum(step + 1.0, LOSS_STEPS))
    return Tally(
        jnp.where(finite, average, tally.loss),
        tally.skipped + ~finite,
        jnp.where(finite, 0, tally.skipped_in_a_row + 1),
    )


def accumulated(gradients: Callable, parts: int) -> Callable:
    """`gradients`, averaged over `parts` equal parts of the batch, one after the other in memory.

    One step remains one step of the optimizer, with one place in the data. Part i takes the rows i,
    i + parts, ..., which lie on the same devices as before, and the key fold_in(key, i).
    """
    if parts == 1:
        return gradients

    def averaged(params: Params, frozen: Any, batch: Batch, key: Key[Array, ""]):
        def add(total, part):
            rows, i = part
            found = gradients(params, frozen, rows, jax.random.fold_in(key, i))
            return jax.tree.map(lambda a, b: a + b / parts, total, found), None

        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, params, frozen, first, key)
        )
        # In a loop, XLA's convolutions on CPUs lose their fast kernels: 12 times the time of the gradients.
        unrolled = jax.default_backend() == "cpu"
        return jax.lax.scan(add, zeros, (split, jnp.arange(parts)), unroll=unrolled)[0]

    return averaged


def computed(loss: Loss, config: StageConfig) -> Loss:
    """`loss`, computed in `config.compute_dtype`; its networks' blocks heed `config.remat`.

    The params that are trained stay float32, and so do their gradients: the cast is part of the loss
    (Micikevicius et al. 2018, section 3.1). So may be those that stay, see `cast`.
    """

    def chosen(params, frozen, batch, key):
        params, frozen = cast((params, frozen), config.compute_dtype)
        with remat(config.remat):
            value, metrics = loss(params, frozen, batch, key)
        return value.astype(jnp.float32), metrics

    return chosen


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """The floats of a tree, on the host or on devices, in another type; the rest as it is."""

    def one(x: ArrayLike) -> ArrayLike:
        same = x.dtype == dtype or not jnp.issubdtype(x.dtype, jnp.floating)
        return x if same else x.astype(dtype)

    return jax.tree.map(one, tree)
