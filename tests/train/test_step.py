"""One training step: what it draws, skips, averages and keeps in memory, on networks of one matrix or two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import ObjectiveConfig, OptimConfig, StageConfig
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.train import objectives, optim, step
from tests.tiny import tiny_model


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
    expected = np.array(PARAMS["kernel"], np.float64)
    for k in range(20):
        state, _ = train_step(state, FROZEN, BATCH, KEY)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["kernel"], np.float64)
        np.testing.assert_allclose(state.ema_params["ema_0.9"]["kernel"], expected, rtol=1e-5)


def test_the_average_of_the_loss_is_its_mean_over_the_first_steps(train_step, state):
    losses = []
    for _ in range(20):
        state, metrics = train_step(state, FROZEN, BATCH, KEY)
        losses.append(metrics["loss"])
        np.testing.assert_allclose(state.tally.loss, np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_a_step_without_finite_gradients_changes_nothing_but_the_count(train_step, state, bad):
    """1e30 is finite, and so is every gradient's entry, but not the square that their norm takes."""
    good, _ = train_step(state, FROZEN, BATCH, KEY)
    wrong = {"x": BATCH["x"].at[0, 0].set(bad)}
    after, metrics = train_step(good, FROZEN, wrong, KEY)
    for name in ("params", "ema_params", "opt_state"):
        assert same(getattr(after, name), getattr(good, name))
    assert int(after.step) == 2
    assert float(after.tally.loss) == float(good.tally.loss)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)

    twice, _ = train_step(after, FROZEN, wrong, KEY)
    assert (int(twice.tally.skipped), int(twice.tally.skipped_in_a_row)) == (2, 2)
    well, metrics = train_step(twice, FROZEN, BATCH, KEY)
    assert (int(well.tally.skipped), int(well.tally.skipped_in_a_row)) == (2, 0)
    assert not same(well.params, twice.params)
    assert np.isfinite(float(metrics["loss"]))


def plain(params, frozen, batch, key):
    """Least squares without noise: a mean over the images."""
    y = jnp.tanh(batch["x"] @ params["kernel"] + params["bias"])
    return jnp.mean((y - batch["y"]) ** 2), {"largest": jnp.abs(y).mean()}


def test_four_parts_of_eight_are_a_batch_of_thirty_two():
    rng = np.random.default_rng(0)
    batch = {"x": rng.standard_normal((32, 3), np.float32), "y": rng.standard_normal((32, 2), np.float32)}
    results = []
    for parts in (1, 4):
        config, optimizer = StageConfig(batch_size=32, accumulate=parts), optim.optimizer(OPTIM, 100)
        train, state = (
            jax.jit(step.train_step(plain, optimizer, config)),
            step.init(PARAMS, optimizer, config),
        )
        for _ in range(10):
            state, metrics = train(state, {}, batch, KEY)
        assert int(state.step) == 10
        results.append((state, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_every_part_draws_noise_of_its_own():
    def drawn(params, frozen, batch, key):
        return jnp.sum(params["bias"]) * 0, {"noise": jax.random.normal(key)}

    config = StageConfig(batch_size=4, accumulate=2)
    run = step.accumulated(jax.value_and_grad(drawn, has_aux=True), config.accumulate)
    (_, metrics), _ = run(PARAMS, {}, BATCH, KEY)
    noise = [jax.random.normal(jax.random.fold_in(KEY, i)) for i in range(2)]
    np.testing.assert_allclose(metrics["noise"], np.mean(noise), rtol=1e-6)


def convolutions(params, frozen, batch, key):
    """Three convolutions with activations: what a U-Net's memory is made of."""
    x = batch["image"].astype(params["kernels"][0].dtype)
    for kernel in params["kernels"].values():
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.silu(x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5))
    return jnp.mean(jnp.square(x - 1.0)), {}


KERNELS = {"kernels": {i: jax.random.normal(jax.random.key(i), (3, 3, 8, 8)) / 8 for i in range(3)}}
IMAGES = {"image": np.random.default_rng(0).standard_normal((4, 16, 16, 8), np.float32)}


def gradient(**options):
    """The gradient of `convolutions`, and the bytes that its forward half keeps for the backward half."""
    loss = step.computed(convolutions, StageConfig(**options))
    _, backward = jax.vjp(lambda params: loss(params, {}, IMAGES, KEY)[0], KERNELS)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    return jax.jit(jax.grad(lambda params: loss(params, {}, IMAGES, KEY)[0]))(KERNELS), kept


def test_a_unet_may_keep_what_its_blocks_give_alone():
    unet = tiny_model().unet
    loss = objectives.over_parts(
        objectives.cached_loss(unet.graphdef, SchedulerConfig("DDIMScheduler"), ObjectiveConfig(), 1.0)
    )
    rng = np.random.default_rng(0)
    batch = {
        "mean": jnp.asarray(rng.standard_normal((2, 8, 8, 4), np.float32)),
        "context": jnp.asarray(rng.standard_normal((2, 16, 24), np.float32)),
    }
    frozen = {"empty": {"context": jnp.zeros((16, 24))}}

    def gradient(remat: str):
        less = step.computed(loss, StageConfig(remat=remat))

        def kept(params):
            return jax.tree.leaves(jax.vjp(lambda p: less(p, frozen, batch, KEY)[0], params)[1])

        params = {"unet": unet.params}
        size = sum(leaf.size for leaf in jax.eval_shape(kept, params))
        return jax.jit(jax.grad(lambda p: less(p, frozen, batch, KEY)[0]))(params), size

    (plain, most), (_, some), (again, least) = map(gradient, ("none", "dots", "blocks"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), plain, again)
    weights = sum(leaf.size for leaf in jax.tree.leaves(unet.params))
    assert weights < least < some < most


def test_bfloat16_computes_and_float32_is_kept():
    (exact, much), (rough, less) = gradient(), gradient(compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype("float32")}
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (exact, rough)]
    difference = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0])
    assert 1e-4 < difference < 0.03
    assert less < 0.6 * much

    config, optimizer = StageConfig(compute_dtype="bfloat16", ema=(0.9,)), optim.optimizer(OPTIM, 10)
    state = step.init(KERNELS, optimizer, config)
    after, metrics = jax.jit(step.train_step(convolutions, optimizer, config))(state, {}, IMAGES, KEY)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert metrics["loss"].dtype == jnp.float32
