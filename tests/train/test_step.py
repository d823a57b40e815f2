"""One training step, its optimizer and its averages, on networks of one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engine.config import OptimConfig, StageConfig
from engine.train import ema, optim, step


def squares(params, frozen, batch, key):
    """A noisy least-squares problem: one matrix, one bias."""
    y = batch["x"] @ params["kernel"] + params["bias"] + 0.1 * jax.random.normal(key, (4, 2))
    return jnp.mean((y - frozen["target"]) ** 2), {"largest": jnp.abs(y).max()}


PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
FROZEN = {"target": jnp.full((4, 2), 3.0)}
BATCH = {"x": jnp.asarray(np.random.default_rng(0).standard_normal((4, 3), np.float32))}
KEY = jax.random.key(0, impl="threefry2x32")
OPTIM = OptimConfig(learning_rate=0.1, warmup_steps=0, decay_steps=0)
STAGE = StageConfig(ema=(0.9,), ema_sigma_rel=(0.1,))


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.fixture(scope="module")
def train_step():
    return jax.jit(step.train_step(squares, optim.optimizer(OPTIM, 100), STAGE))


@pytest.fixture
def state():
    return step.init(PARAMS, optim.optimizer(OPTIM, 100), STAGE)


def test_a_step_is_pure(train_step, state):
    before = jax.tree.map(np.array, state)
    first, metrics = train_step(state, FROZEN, BATCH, KEY)
    second, _ = train_step(state, FROZEN, BATCH, KEY)
    assert same(first, second)
    assert same(state, before)
    assert not same(first.params, state.params)
    assert int(first.step) == 1
    assert metrics.keys() == {"loss", "grad_norm", "largest", "skipped", "skipped_in_a_row"}


def test_every_step_and_every_seed_draws_noise_of_its_own(train_step, state):
    def loss(state, key):
        return float(train_step(state, FROZEN, BATCH, key)[1]["loss"])

    later = state._replace(step=state.step + 1)
    other = jax.random.key(1, impl="threefry2x32")
    assert len({loss(state, KEY), loss(later, KEY), loss(state, other)}) == 3


def test_the_state_owns_its_arrays(state):
    leaves = jax.tree.leaves((PARAMS, state.params, state.ema_params))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(pointers)) == len(pointers)


def test_ema_follows_its_formula(train_step, state):
    expected = np.array(state.ema_params["kernel"], np.float64)
    for k in range(20):
        state, _ = train_step(state, FROZEN, BATCH, KEY)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["kernel"], np.float64)
        np.testing.assert_allclose(state.ema_params["kernel"], expected, rtol=1e-5)


def test_ema_of_what_does_not_move_does_not_move():
    params = {"a": jnp.float32(0.1)}
    assert float(ema.update(params, params, jnp.int32(5), 0.999)["a"]) == float(params["a"])


@pytest.mark.parametrize(
    "at, rate", [(0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0), (80, 1.0), (90, 0.5), (99, 0.05), (100, 0.0)]
)
def test_learning_rate_rises_stays_and_falls(at, rate):
    schedule = optim.learning_rate(OptimConfig(learning_rate=2.0, warmup_steps=10, decay_steps=20), 100)
    assert float(schedule(at)) == pytest.approx(2.0 * rate, abs=1e-6)


def test_learning_rate_of_a_run_that_is_shorter_than_its_decay():
    schedule = optim.learning_rate(OptimConfig(learning_rate=1.0, warmup_steps=10, decay_steps=1000), 30)
    assert [float(schedule(i)) for i in (0, 10, 20, 30)] == pytest.approx([0.0, 1.0, 0.5, 0.0])


def test_learning_rate_without_warm_up_and_decay_is_constant():
    schedule = optim.learning_rate(OptimConfig(learning_rate=1.0, warmup_steps=0, decay_steps=0), 30)
    assert [float(schedule(i)) for i in (0, 15, 29)] == [1.0, 1.0, 1.0]


def test_weight_decay_is_for_matrices_alone():
    config = OptimConfig(learning_rate=0.5, warmup_steps=0, decay_steps=0, weight_decay=0.1)
    optimizer = optim.optimizer(config, 10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam forgets the scale of a constant gradient, but its second moment tells what it was given."""
    optimizer = optim.optimizer(OptimConfig(clip_norm=2.0, b2=0.9), 10)
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(1)}
    grads = {"kernel": jnp.full((2, 2), 6.0), "bias": jnp.full(1, 9.0)}  # norm 15
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = optax.tree.get(state, "nu")
    np.testing.assert_allclose(moments["kernel"], 0.1 * (6 * 2 / 15) ** 2, rtol=1e-5)
    np.testing.assert_allclose(moments["bias"], 0.1 * (9 * 2 / 15) ** 2, rtol=1e-5)
