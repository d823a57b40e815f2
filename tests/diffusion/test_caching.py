"""Deep features that are kept over some steps: what is computed when, and what it gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import engine
from engine.diffusion import caching, samplers
from engine.diffusion.noise import image_keys
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.diffusion.schedules import schedule_for
from engine.ways import ways_of
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

SIGMAS = jnp.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
X = 8 * jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
PROMPTS = ["a red fox", "a blue car"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return engine.load(tiny_folder(tmp_path_factory.mktemp("tiny") / "model"))


def draw(pipe, **options):
    return pipe.generate(PROMPTS, **{"seed": 7, "steps": 4, "sampler": "euler"} | options)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_every_sampler_hands_on_what_the_network_keeps(sampler):
    """The network calls that a sampler makes, counted by what is kept; and x is as without it."""
    keys, made = image_keys(0, range(2)), samplers.SAMPLERS[sampler]
    options = (
        {"schedule": schedule_for(SchedulerConfig("LCMScheduler"))} if "schedule" in made.options else {}
    )
    init, step = caching.keeping(
        made,
        lambda x, sigma, i, kept: (x / (1 + sigma**2), kept + i),
        lambda x: jnp.zeros(len(x), jnp.int32),
        SIGMAS,
        keys,
        **options,
    )
    steps = made.steps(5)
    state, _ = jax.lax.scan(step, init(X), jnp.arange(steps))
    np.testing.assert_array_equal(state.kept, [steps * (steps - 1) // 2] * 2)
    expected, _ = samplers.sample(sampler, lambda x, s: x / (1 + s**2), X, SIGMAS, keys, **options)
    np.testing.assert_allclose(state.carry.x, expected, rtol=1e-6, atol=1e-6)


def test_recall_computes_where_it_is_told_to_and_nowhere_else():
    ran = []

    def compute():
        jax.debug.callback(lambda: ran.append(1))
        return jnp.ones((4, 2, 2, 3))

    @jax.jit
    def call(kept, fresh):
        recall = caching.Recall(kept, fresh)
        return recall(compute), recall.kept

    kept = jnp.full((2, 2, 2, 2, 3), 5.0)  # two pictures, two passes
    for fresh, value in ((True, 1.0), (False, 5.0)):
        ran.clear()
        feature, after = call(kept, fresh)
        jax.effects_barrier()
        assert len(ran) == fresh
        assert (feature.shape, after.shape) == ((4, 2, 2, 3), kept.shape)
        assert (np.asarray(feature) == value).all() and (np.asarray(after) == value).all()


def test_all_steps_computed_is_the_picture_of_before(pipe):
    whole = draw(pipe)
    np.testing.assert_array_equal(draw(pipe, cache_interval=1), whole)
    # a program of its own, in which the first step alone computes, and there is no other
    one = draw(pipe, steps=1)
    assert np.abs(draw(pipe, steps=1, cache_interval=7).astype(int) - one).max() <= 1
    kept = [draw(pipe, cache_interval=every).astype(int) for every in (2, 3)]
    assert np.abs(kept[0] - whole).max() > 1
    assert np.abs(kept[0] - kept[1]).max() > 1


def test_another_interval_compiles_nothing(pipe):
    draw(pipe, cache_interval=2)
    before = pipe.programs.segment_program.cache_info().currsize
    draw(pipe, cache_interval=3)
    assert pipe.programs.segment_program.cache_info().currsize == before


def test_each_picture_is_its_own_whatever_is_drawn_beside_it(pipe):
    images = draw(pipe, cache_interval=2)
    alone = pipe.generate(PROMPTS[1:], seed=7, first_index=1, steps=4, sampler="euler", cache_interval=2)
    assert np.abs(alone[0].astype(int) - images[1]).max() <= 1


@pytest.mark.parametrize(
    "sampler, fresh, more",
    [
        ("euler", [0, 2, 4, 6, 8], [3]),  # guidance begins with step 3
        # two steps an interval; with step 5, at the end of the third
        ("heun", [0, 1, 4, 5, 8, 9, 12, 13, 16, 17], [6, 7]),
        ("pndm", [0, 1, 3, 5, 7, 9], [4]),  # with step 4, as its first interval took two
    ],
)
def test_which_steps_compute_all(pipe, sampler, fresh, more):
    """Every other interval, and where guidance may begin."""
    settings = pipe.settings(10, sampler, guidance_start=0.3, cache_interval=2)
    (way,) = ways_of(settings, pipe.programs, None)
    assert np.flatnonzero(way.fresh).tolist() == sorted(fresh + more)
    settings = pipe.settings(10, sampler, guidance_end=0.7, cache_interval=2)
    (way,) = ways_of(settings, pipe.programs, None)
    assert np.flatnonzero(way.fresh).tolist() == fresh
