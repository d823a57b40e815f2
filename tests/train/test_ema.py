"""Averages against closed forms: the width of a power function, and others built from two of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import StageConfig, TrainConfig
from engine.train import ema
from engine.types import UserError

WIDTHS = [0.03, 0.05, 0.1, 0.15, 0.2]
STEPS, EVERY = 2000, 50


def test_the_average_of_what_does_not_move_does_not_move():
    params = {"a": jnp.float32(0.1)}
    for share in ema.shares(StageConfig(ema=(0.999,), ema_sigma_rel=(0.1,))).values():
        assert float(ema.update(params, params, share(jnp.int32(5)))["a"]) == float(params["a"])


@pytest.mark.parametrize("width", [*WIDTHS, 0.28])
def test_gamma_gives_the_width_of_the_profile(width):
    """sigma_rel is the standard deviation of p(t) = (gamma + 1) t^gamma over [0, 1], here by quadrature."""
    gamma = ema.gamma_of(width)
    x, w = np.polynomial.legendre.leggauss(200)
    t, w = (x + 1) / 2, w / 2
    p = (gamma + 1) * t**gamma
    mean = np.sum(w * p * t)
    assert np.sum(w * p) == pytest.approx(1)
    assert np.sqrt(np.sum(w * p * (t - mean) ** 2)) == pytest.approx(width, rel=1e-6)


def weights(width: float, steps: int) -> np.ndarray:
    """What the params after each step weigh in the average, from the shares that the steps use."""
    share = np.asarray(jax.vmap(ema.power(width))(jnp.arange(steps)), np.float64)
    later = np.append(np.cumprod((1 - share)[:0:-1])[::-1], 1.0)  # what the steps after it leave
    return share * later


@pytest.mark.parametrize("width", WIDTHS)
def test_the_steps_follow_the_profile(width):
    """After t steps, step k weighs the integral of the profile over [k - 1, k]; the first step has it all."""
    found, gamma = weights(width, STEPS), ema.gamma_of(width)
    k = np.arange(STEPS + 1) / STEPS
    np.testing.assert_allclose(found, np.diff(k ** (gamma + 1)), rtol=1e-3, atol=1e-9)
    t = np.arange(1, STEPS + 1)
    mean = np.sum(found * t)
    assert np.sum(found) == pytest.approx(1, abs=1e-5)
    assert np.sqrt(np.sum(found * (t - mean) ** 2)) / STEPS == pytest.approx(width, rel=2e-3)


def test_shares_stay_exact_after_a_million_steps():
    gamma, step = ema.gamma_of(0.05), 3_000_000
    expected = -np.expm1((gamma + 1) * np.log1p(-1.0 / (step + 1)))
    assert float(ema.power(0.05)(jnp.int32(step))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "a, b", [((1000, 0.05), (1000, 0.1)), ((700, 0.1), (1000, 0.05)), ((1, 0.2), (9, 0.2))]
)
def test_inner_products_are_integrals(a, b):
    (t_a, gamma_a), (t_b, gamma_b) = ((t, ema.gamma_of(width)) for t, width in (a, b))
    x, w = np.polynomial.legendre.leggauss(400)
    end = min(t_a, t_b)
    t, w = end * (x + 1) / 2, end * w / 2
    profiles = (
        (gamma + 1) * t**gamma / last ** (gamma + 1) for last, gamma in ((t_a, gamma_a), (t_b, gamma_b))
    )
    expected = np.sum(w * np.prod([*profiles], axis=0))
    assert ema.inner(t_a, gamma_a, t_b, gamma_b) == pytest.approx(expected, rel=1e-6)
    assert ema.inner(t_b, gamma_b, t_a, gamma_a) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of snapshots, and the true averages of every width: params that settle, and wander."""
    config = StageConfig(ema=(0.9,), ema_sigma_rel=(0.05, 0.1), ema_snapshot_every=EVERY)
    folder = tmp_path_factory.mktemp("run") / "ema"
    rng, names = np.random.default_rng(0), [ema.power_name(width) for width in WIDTHS]
    walk = np.cumsum(rng.standard_normal((STEPS, 6)), 0) / STEPS**0.5
    path = jnp.asarray(walk + 3 * np.exp(-np.arange(STEPS) / 300)[:, None], jnp.float32)

    def params(row):
        return {"blocks": {0: {"kernel": row[:4].reshape(2, 2)}, 1: {"bias": row[4:]}}}

    @jax.jit
    def run(averages, first):
        def step(averages, i):
            new = {
                ema.power_name(width): ema.update(
                    averages[ema.power_name(width)], params(path[i]), ema.power(width)(i)
                )
                for width in WIDTHS
            }
            return new, None

        return jax.lax.scan(step, averages, first + jnp.arange(EVERY))[0]

    averages, kept = {name: params(path[0]) for name in names}, {}
    for done in range(EVERY, STEPS + 1, EVERY):
        averages = kept[done] = run(averages, done - EVERY)
        ema.save_snapshots(folder, done, averages, config)
    return folder, kept, np.asarray(path)


def flat(params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def test_snapshots_are_files_by_step_and_width(trained):
    found = ema.snapshots(trained[0])
    assert [(each.step, each.sigma_rel) for each in found[:3]] == [(50, 0.05), (50, 0.1), (100, 0.05)]
    assert len(found) == 2 * STEPS // EVERY
    assert found[0].path.name == "00000050-0.05.safetensors"
    assert not [*trained[0].glob(".*")]


@pytest.mark.parametrize("width", [0.05, 0.1])
@pytest.mark.parametrize("at_step", [STEPS // 2, STEPS])
def test_a_width_that_was_kept_comes_back(trained, width, at_step):
    folder, kept, _ = trained
    found = ema.reconstruct(ema.snapshots(folder), width, at_step)
    expected = kept[at_step][ema.power_name(width)]
    assert jax.tree.structure(found) == jax.tree.structure(expected)  # numbers of a list stay numbers
    np.testing.assert_allclose(flat(found), flat(expected), atol=1e-5)


@pytest.mark.parametrize("width", [0.03, 0.15, 0.2])
@pytest.mark.parametrize("at_step", [STEPS // 2, STEPS])
def test_another_width_is_built_from_the_two(trained, width, at_step):
    """Next to what the average moved, or what the two kept ones are apart, the error is small."""
    folder, kept, path = trained
    found = flat(ema.reconstruct(ema.snapshots(folder), width, at_step))
    expected = flat(kept[at_step][ema.power_name(width)])
    nearest = flat(kept[at_step][ema.power_name(0.05 if width < 0.05 else 0.1)])
    assert np.abs(found - expected).max() < 0.05 * np.abs(nearest - expected).max()
    assert np.abs(found - expected).max() < 0.01 * path[:at_step].std()


def test_half_precision_snapshots_take_half_the_bytes(trained, tmp_path):
    _, kept, _ = trained
    config = StageConfig(ema_sigma_rel=(0.05, 0.1), ema_snapshot_dtype="float16")
    for step, averages in kept.items():
        ema.save_snapshots(tmp_path, step, averages, config)
    found = flat(ema.reconstruct(ema.snapshots(tmp_path), 0.1, STEPS))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, flat(kept[STEPS][ema.power_name(0.1)]), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("at_step, last", [(120, "100"), (30, "none")])
def test_a_step_without_snapshots_is_refused(trained, at_step, last):
    message = f"no snapshot of step {at_step}; the last before it is of step {last}"
    with pytest.raises(UserError, match=message):
        ema.reconstruct(ema.snapshots(trained[0]), 0.1, at_step)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ema": ()}, r"words.ema=\(\): write one or more numbers from 0 to below 1"),
        ({"ema": (1.0,)}, r"words.ema=\(1.0,\): write one or more numbers"),
        ({"ema": (0.9, 0.9)}, r"words.ema=\(0.9, 0.9\): write each number once"),
        ({"ema_sigma_rel": (0.3,)}, "write numbers above 0 and up to 0.28"),
        ({"ema_snapshot_every": 5}, "words.ema_snapshot_every without averages to keep"),
        ({"ema_snapshot_dtype": "half"}, "words.ema_snapshot_dtype='half' is unknown"),
    ],
)
def test_a_mistake_is_told_in_one_line(change, message):
    config = TrainConfig()
    for name, value in change.items():
        setattr(config.words, name, value)
    with pytest.raises(UserError, match=message):
        config.validate()
