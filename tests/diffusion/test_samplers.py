"""Samplers on images that are N(MU, S^2): the denoiser and the solution of the ODE are known in closed form.

tests/parity/test_schedulers.py holds every step against PyTorch diffusers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from engine.diffusion.noise import image_keys, initial_noise
from engine.diffusion.samplers import SAMPLERS, Carry, sample, sample_segment, start
from engine.diffusion.schedules import exponential, karras
from engine.types import UserError
from tests.compiled import COMPILED
from tests.compiling import FUSING, LOOPING

pytestmark = pytest.mark.usefixtures("quick_compiler")


MU, S = 0.7, 0.5
SIGMA_MAX = 10.0


def denoise(x, sigma):
    """E[x0 | x] for x = x0 + sigma eps."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def solution(x, sigma_from, sigma_to):
    """Of dx / dsigma = (x - D) / sigma: x - MU shrinks like the spread of x."""
    return MU + (x - MU) * jnp.sqrt((S**2 + sigma_to**2) / (S**2 + sigma_from**2))


def consistency(x, sigma):
    """Where the ODE takes x: what lcm wants of its model, in place of the denoiser."""
    return solution(x, sigma, 0.0)


def falling(steps, end=0.0):
    """A karras grid from SIGMA_MAX to 0.02, and then to `end`."""
    return jnp.asarray(np.append(karras(steps, 0.02, SIGMA_MAX), end), jnp.float32)


@functools.partial(jax.jit, static_argnames=("sampler", "options"))
def run(sampler, x, sigmas, keys, options=()):
    model = consistency if sampler == "lcm" else denoise
    return sample(sampler, model, x, sigmas, keys, **dict(options))


# lcm writes the same sum in two places, which only a fusion of the two rounds alike
fused = jax.jit(run.__wrapped__, static_argnames=("sampler", "options"), compiler_options=FUSING)

looped = jax.jit(run.__wrapped__, static_argnames=("sampler", "options"), compiler_options=LOOPING)


def noise(keys, shape=(4, 4, 2)):
    return MU + np.sqrt(S**2 + SIGMA_MAX**2) * initial_noise(keys, shape)


def error_at(step, sampler, options, steps):
    """After that step, in float64, on a grid that stays above 0."""
    with jax.enable_x64(True):
        keys, x = image_keys(0, [0]), jnp.full((1, 1, 1, 1), 3.0, jnp.float64)
        sigmas = jnp.asarray(exponential(steps + 1, 0.1, SIGMA_MAX))
        _, trace = run(sampler, x, sigmas, keys, options)
        return abs(trace.x[step].item() - solution(3.0, SIGMA_MAX, float(sigmas[step])))


ORDERS = [
    *((name, (), -1, 1) for name in ("euler", "ddim")),
    *((name, (), -1, 2) for name in ("heun", "dpmpp_2m", "pndm", "lms", "deis", "dpm_2")),
    *((name, (("eta", 0.0),), -1, 2) for name in ("dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_3m_sde")),
    ("deis", (("solver_order", 3),), -1, 2),  # its first step is of order 1, which leaves an error of order 2
    ("unipc", (), -1, 2),  # its last step, too, is of order 1 and never corrected
    *(("unipc", (("solver_type", kind),), -2, 3) for kind in ("bh1", "bh2")),
]


@pytest.mark.parametrize(("sampler", "options", "step", "order"), ORDERS)
def test_order_of_convergence(sampler, options, step, order):
    """Halving the steps divides the error by 2^order."""
    counts = (512, 1024, 2048)  # as many for lms, of order 4 after three steps of lower order
    errors = [error_at(step, sampler, options, steps) for steps in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2)


def made_of(eps, power):
    """A denoiser whose slope eps is a polynomial in sigma or log sigma, whatever x."""
    return lambda x, sigma: x - sigma * eps(sigma) ** power


@pytest.mark.parametrize(
    ("sampler", "options", "power"),
    [("lms", (), 3), ("deis", (), 1), ("deis", (("solver_order", 3),), 2)],
)
def test_adams_bashforth_is_exact_for_polynomials(sampler, options, power):
    """Of a degree below its order, once it has as many slopes; whatever the spacing of the grid."""
    with jax.enable_x64(True):
        sigmas = jnp.asarray(np.append(karras(20, 0.1, SIGMA_MAX), 0.03))
        u = (lambda sigma: sigma) if sampler == "lms" else jnp.log
        x = jnp.zeros((1, 1, 1, 1), jnp.float64)
        _, trace = sample(sampler, made_of(u, power), x, sigmas, image_keys(0, [0]), **dict(options))
        steps = np.diff(np.asarray(trace.x).ravel())[power:]
        integral = {
            ("lms", 3): lambda s: s**4 / 4,
            ("deis", 1): lambda s: s * np.log(s) - s,
            ("deis", 2): lambda s: s * (np.log(s) ** 2 - 2 * np.log(s) + 2),
        }[sampler, power]
        expected = np.diff(integral(np.asarray(sigmas)))[power + 1 :]
    np.testing.assert_allclose(steps, expected, rtol=1e-6, atol=1e-8)


DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_follow_the_ode_to_the_image(sampler):
    keys = image_keys(5, range(4))
    x = noise(keys)
    last, _ = run(sampler, x, falling(100), keys)
    np.testing.assert_allclose(last, solution(x, SIGMA_MAX, 0.0), atol=0.03)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *((name, ()) for name in SAMPLERS if name != "tcd"),
        (
            "tcd",
            (("eta", 0.02),),
        ),  # at 0.3 no number of steps is enough: each adds much noise
        ("ddim", (("eta", 0.5),)),
        ("euler_ancestral", (("eta", 0.3),)),
        ("euler", (("s_churn", 5.0),)),
        ("heun", (("s_churn", 40.0),)),
    ],
)
def test_samples_have_the_known_mean_and_variance(sampler, options):
    """65,536 values: chance moves the mean by 0.002 and the deviation by 0.3 %. The rest of the tolerance is
    for the step: at 150 steps ddpm is 2.3 % short of the deviation, at 300 steps 1.1 %."""
    keys = image_keys(1, range(16))
    last, _ = looped(sampler, noise(keys, (32, 32, 4)), falling(150), keys, options)
    assert float(last.mean()) == pytest.approx(MU, abs=0.01)
    assert float(last.std()) == pytest.approx(S, rel=0.03)


STOCHASTIC = [
    *((name, ()) for name, sampler in SAMPLERS.items() if sampler.stochastic),
    *(("ddim", (("eta", 0.5),)), ("euler", (("s_churn", 40.0),)), ("heun", (("s_churn", 40.0),))),
]


@pytest.mark.parametrize(("sampler", "options"), STOCHASTIC)
def test_step_noise_is_the_images_own(sampler, options):
    """Same start, other keys: other images. Same keys in another order: the same images in that order."""
    keys, others, sigmas = image_keys(1, range(4)), image_keys(2, range(4)), falling(10)
    x, order = noise(keys), np.asarray([2, 0, 3, 1])
    first, _ = run(sampler, x, sigmas, keys, options)
    assert np.abs(first - run(sampler, x, sigmas, others, options)[0]).mean() > 0.1
    np.testing.assert_array_equal(run(sampler, x[order], sigmas, keys[order], options)[0], first[order])


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_ignore_the_keys(sampler):
    x = noise(image_keys(1, range(4)))
    runs = [run(sampler, x, falling(10), image_keys(seed, range(4)))[0] for seed in (1, 2)]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_step_to_zero_is_the_denoised_image(sampler, steps):
    """Bit for bit, and for a run of one step too: no division by 0, no infinite step in log sigma."""
    keys = image_keys(1, range(4))
    x, trace = (fused if sampler == "lcm" else run)(sampler, noise(keys), falling(steps), keys)
    assert np.isfinite(trace.x).all() and np.isfinite(trace.denoised).all()
    if sampler not in ("pndm", "lms"):
        np.testing.assert_array_equal(x, trace.denoised[-1])
    elif steps == 1:  # from the second step on, their slope is a mean over past steps
        np.testing.assert_allclose(x, trace.denoised[-1], atol=1e-5)


MIDPOINT = ("dpm_2", "dpmpp_sde")  # on the way to sigma_down, of the ancestral ones, sigma' is the middle


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_number_of_network_calls(sampler):
    """One a step: at all levels of the grid but the last; by some, within all intervals but the last, too."""
    keys, calls = image_keys(1, [0]), []

    def counted(x, sigma):
        jax.debug.callback(lambda sigma: calls.append(rounded(sigma)), sigma)
        return denoise(x, sigma)

    def rounded(sigma):
        return float(f"{float(sigma):.5g}")

    for steps in (1, 6):
        calls.clear()
        _, trace = jax.block_until_ready(sample(sampler, counted, noise(keys), falling(steps), keys))
        jax.effects_barrier()
        assert len(calls) == len(trace.x) == SAMPLERS[sampler].steps(steps)
        grid = [rounded(sigma) for sigma in falling(steps)[:-1]]
        assert set(calls) >= set(grid)
        between = sorted(set(calls) - set(grid), reverse=True)
        assert len(between) == (steps - 1 if sampler in MIDPOINT else 0)
        assert all(a > middle > b for a, middle, b in zip(grid, between, grid[1:], strict=False))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_segments_carry_on_exactly(sampler):
    """One compiled segment, run again and again, gives the bits of the whole run."""
    keys, sigmas = image_keys(1, range(4)), falling(10)
    x, total = noise(keys), SAMPLERS[sampler].steps(10)
    model = consistency if sampler == "lcm" else denoise  # as `run` has it
    plain = functools.partial(sample_segment, sampler, model, sigmas=sigmas, keys=keys)
    COMPILED.clear()
    segment = jax.jit(plain, static_argnames="steps")
    whole, trace = segment(start(sampler, denoise, x, sigmas, keys), first=0, steps=total)

    carry, seen = start(sampler, denoise, x, sigmas, keys), []
    for first in range(0, total, 5):
        carry, part = segment(carry, first=jnp.asarray(first), steps=min(5, total - first))
        seen.append(part.x)
    np.testing.assert_array_equal(carry.x, whole.x)
    np.testing.assert_array_equal(np.concatenate(seen), trace.x)
    assert COMPILED["jit(sample_segment)"] <= 3  # the whole, five steps, and what is left
    np.testing.assert_allclose(run(sampler, x, sigmas, keys)[0], whole.x, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_runs_inside_shard_map_with_checked_types(sampler):
    keys, sigmas = image_keys(1, range(4)), falling(10)
    x = noise(keys)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    data, whole = PartitionSpec("data"), PartitionSpec()

    def last(x, sigmas, keys):
        return run(sampler, x, sigmas, keys)[0]

    sharded = jax.shard_map(last, mesh=mesh, in_specs=(data, whole, data), out_specs=data, check_vma=True)
    expected, _ = run(sampler, x, sigmas, keys)
    np.testing.assert_allclose(jax.jit(sharded)(x, sigmas, keys), expected, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_latents_are_sampled_in_float32(sampler):
    keys = image_keys(1, [0])
    x = noise(keys).astype(jnp.bfloat16)
    assert start(sampler, denoise, x, falling(3), keys).x.dtype == jnp.float32
    assert jax.eval_shape(run, sampler, x, falling(3), keys)[0].dtype == jnp.float32


def test_a_sampler_is_an_init_and_a_step():
    keys, sigmas = image_keys(1, [0]), falling(3)
    init, step = SAMPLERS["euler"].make(denoise, sigmas, keys)
    carry = init(noise(keys))
    assert isinstance(carry, Carry)
    carry, trace = step(carry, 0)
    np.testing.assert_array_equal(carry.x, trace.x)
    np.testing.assert_allclose(carry.x, solution_of_one_euler_step(noise(keys), sigmas), rtol=1e-5)


def solution_of_one_euler_step(x, sigmas):
    return x + (sigmas[1] - sigmas[0]) * (x - denoise(x, sigmas[0])) / sigmas[0]


def test_an_unknown_sampler_is_refused():
    with pytest.raises(UserError, match=r"unknown .did you mean euler"):
        sample("eular", denoise, jnp.zeros((1, 2, 2, 1)), falling(2), image_keys(0, [0]))
