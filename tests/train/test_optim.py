"""Optimizers by name: the rate, what is clipped, what is decayed, and that each goes down."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engine.config import OPTIMIZERS, OptimConfig, TrainConfig
from engine.train import optim
from engine.types import UserError

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)},
    "embedding": {"embedding": jnp.ones((10, 8))},
    "layers": {0: {"kernel": jnp.ones((8, 8))}},
}


def first_update(config, params, grads):
    optimizer = optim.optimizer(config, 10)
    return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize(
    "at, rate", [(0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0), (80, 1.0), (90, 0.5), (99, 0.05), (100, 0.0)]
)
def test_learning_rate_rises_stays_and_falls(at, rate):
    schedule = optim.learning_rate(OptimConfig(learning_rate=2.0, warmup_steps=10, decay_steps=20), 100)
    assert float(schedule(at)) == pytest.approx(2.0 * rate, abs=1e-6)


@pytest.mark.parametrize("at", [0, 5, 10, 50, 80, 85, 90, 95, 100])
def test_learning_rate_falls_along_a_cosine(at):
    config = OptimConfig(learning_rate=2.0, warmup_steps=10, decay_steps=20, decay="cosine")
    rate = np.clip(at / 10, 0, 1) * (1 + np.cos(np.pi * np.clip((at - 80) / 20, 0, 1)))
    assert float(optim.learning_rate(config, 100)(at)) == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize("decay, middle", [("linear", 0.5), ("cosine", 0.5)])
def test_learning_rate_of_a_run_that_is_shorter_than_its_decay(decay, middle):
    config = OptimConfig(learning_rate=1.0, warmup_steps=10, decay_steps=1000, decay=decay)
    schedule = optim.learning_rate(config, 30)
    assert [float(schedule(i)) for i in (0, 10, 20, 30)] == pytest.approx([0.0, 1.0, middle, 0.0])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_learning_rate_without_warm_up_and_decay_is_constant(decay):
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, decay_steps=0, decay=decay)
    assert [float(optim.learning_rate(config, 30)(i)) for i in (0, 15, 29)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_for_matrices_alone_and_goes_with_the_rate(name):
    config = OptimConfig(
        learning_rate=0.5, warmup_steps=0, decay_steps=0, weight_decay=0.1, name=name, no_weight_decay=()
    )
    updates = first_update(config, PARAMS, jax.tree.map(jnp.zeros_like, PARAMS))
    bias = updates["conv"].pop("bias")
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(bias, 0.0)


def test_patterns_of_names_are_left_out_of_weight_decay():
    config = OptimConfig(no_weight_decay=("embedding$", r"layers\.0\."))
    assert optim.decayed(config, PARAMS) == {
        "conv": {"kernel": True, "bias": False},
        "embedding": {"embedding": False},
        "layers": {0: {"kernel": False}},
    }


@pytest.mark.parametrize("clip_norm, factor", [(2.0, 2 / 15), (0.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, factor):
    """Adam forgets the scale of a constant gradient, but its second moment tells what it was given."""
    optimizer = optim.optimizer(OptimConfig(clip_norm=clip_norm, b2=0.9), 10)
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(1)}
    grads = {"kernel": jnp.full((2, 2), 6.0), "bias": jnp.full(1, 9.0)}  # norm 15
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = optax.tree.get(state, "nu")
    np.testing.assert_allclose(moments["kernel"], 0.1 * (6 * factor) ** 2, rtol=1e-5)
    np.testing.assert_allclose(moments["bias"], 0.1 * (9 * factor) ** 2, rtol=1e-5)


def test_adamw_is_that_of_optax():
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, decay_steps=3, clip_norm=0.0)
    ours = optim.optimizer(config, 10)
    mask = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
    rate = optim.learning_rate(config, 10)
    theirs = optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=0.01, mask=mask)
    states, params = [each.init(PARAMS) for each in (ours, theirs)], PARAMS
    for i in range(4):
        grads = jax.tree.map(lambda p, i=i: p * (i + 1) - 3.0, params)
        (update, states[0]), (expected, states[1]) = (
            each.update(grads, state, params) for each, state in zip((ours, theirs), states, strict=True)
        )
        jax.tree.map(np.testing.assert_array_equal, update, expected)
        params = optax.apply_updates(params, update)


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adam():
    """The singular values of an update are near one another; its root mean square is that of AdamW."""
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, decay_steps=0, weight_decay=0.0, name="muon")
    keys = iter(jax.random.split(jax.random.key(0), 9))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), PARAMS)
    updates = first_update(config, PARAMS, grads)
    kernel = np.asarray(updates["conv"]["kernel"])
    for matrix, gradient in (
        (kernel.reshape(-1, 8), grads["conv"]["kernel"].reshape(-1, 8)),
        (updates["layers"][0]["kernel"], grads["layers"][0]["kernel"]),
    ):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() < 2 * values.min() and np.linalg.cond(gradient) > 2
        assert 0.1 < np.sqrt(np.mean(np.square(matrix))) < 0.3
        assert np.sum(np.asarray(matrix) * np.asarray(gradient)) < 0  # downhill
    for update, gradient in (
        (updates["conv"]["bias"], grads["conv"]["bias"]),
        (updates["embedding"]["embedding"], grads["embedding"]["embedding"]),
    ):
        np.testing.assert_array_equal(np.sign(update), -np.sign(gradient))
        np.testing.assert_allclose(np.abs(update), np.abs(update).max(), rtol=1e-4)  # Adam's first step


def test_lion_goes_by_signs_and_adafactor_keeps_a_row_and_a_column():
    grads = jax.tree.map(lambda p: jnp.where(jnp.arange(p.size).reshape(p.shape) % 2, 3.0, -0.1), PARAMS)
    config = OptimConfig(learning_rate=0.5, warmup_steps=0, decay_steps=0, weight_decay=0.0, name="lion")
    lion = first_update(config, PARAMS, grads)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.5 * np.sign(g)), lion, grads)

    wide = {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}
    kept = optim.optimizer(OptimConfig(name="adafactor"), 10).init(wide)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) < 256 * 512 / 50


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_down(name):
    config = OptimConfig(learning_rate=0.05, warmup_steps=10, decay_steps=100, weight_decay=0.0, name=name)
    optimizer, target = optim.optimizer(config, 200), jax.random.normal(jax.random.key(1), (8, 8))

    def loss(params):
        return jnp.mean(jnp.square(params["kernel"] - target)) + jnp.mean(jnp.square(params["bias"] - 1))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}
    state, first = optimizer.init(params), loss(params)
    for _ in range(200):
        params, state = step(params, state)
    assert loss(params) < 0.05 * first


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "adam"}, r"words.optim.name='adam' is unknown \(did you mean adamw\?\); write adamw, "),
        ({"decay": "step"}, "words.optim.decay='step' is unknown"),
        ({"learning_rate": 0.0}, "words.optim.learning_rate=0.0: write one above 0"),
        ({"clip_norm": -1.0}, "words.optim.clip_norm=-1.0: write a number from 0"),
        ({"b2": 1.0}, "words.optim.b2=1.0: write a number from 0 to below 1"),
        ({"no_weight_decay": ("(",)}, r"words.optim.no_weight_decay: '\(' is no pattern"),
    ],
)
def test_a_mistake_is_told_in_one_line(change, message):
    config = TrainConfig()
    for name, value in change.items():
        setattr(config.words.optim, name, value)
    with pytest.raises(UserError, match=message) as error:
        config.validate()
    assert "\n" not in str(error.value)
