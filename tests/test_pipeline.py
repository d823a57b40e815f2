"""The contract of `load` and `generate`, on a tiny model."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import engine
from engine import loading, programs
from engine.config import OF_THE_WAY
from engine.diffusion import noise, samplers
from engine.diffusion.segments import segment_length
from engine.errors import UserNotice
from engine.finish import to_uint8
from engine.parts import module
from engine.pipeline import Pipeline
from engine.requests import OfTheWay, Settings, check_scaled
from engine.types import UserError
from tests.compiled import COMPILED
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

# One level: what is tested here does not depend on the network, and half the compiler's time does.
ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}
PROMPTS = ["a red fox", "a blue car", "a cat"]
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", unet=ONE_LEVEL)


@pytest.fixture(scope="module")
def pipe(folder):
    return engine.load(folder)


def draw(pipe, prompts=PROMPTS, **options):
    """Three at once, so that all calls share their compiled stages."""
    return pipe.generate(prompts, **{"seed": 7, "steps": STEPS, "batch_size": 3} | options)


def stream(pipe, prompts=PROMPTS, **options):
    steps, sampler = options.pop("steps", STEPS), options.pop("sampler", None)
    settings = pipe.settings(steps=steps, sampler=sampler, batch_size=3)
    return list(pipe.stream(prompts, None, settings, **{"seed": 7} | options))


def start_latents(seed: int, count: int) -> np.ndarray:
    return np.array(noise.initial_noise(noise.image_keys(seed, range(count)), (8, 8, 4)))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ---- pictures


def test_one_picture_for_each_prompt(pipe):
    images = draw(pipe)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert min(image.std() for image in images) > 20
    assert draw(pipe, PROMPTS * 2).shape == (6, 16, 16, 3)


def test_height_and_width(pipe):
    assert draw(pipe, height=8, width=24).shape == (3, 8, 24, 3)
    assert pipe.default_size == (16, 16)
    np.testing.assert_array_equal(draw(pipe, height=16, width=16), draw(pipe))


def test_the_seed_and_the_words_decide(pipe):
    images = draw(pipe)
    np.testing.assert_array_equal(draw(pipe), images)
    assert difference(draw(pipe, seed=8), images) > 8
    others = draw(pipe, ["a dog", *PROMPTS[1:]])
    assert difference(others[:1], images[:1]) > 8
    np.testing.assert_array_equal(others[1:], images[1:])


def test_without_a_seed_every_call_is_fresh(pipe):
    assert difference(draw(pipe, seed=None), draw(pipe, seed=None)) > 8


def test_guidance_in_part_of_the_steps(pipe):
    """In all of them, it is as if nothing was said; in the first, another picture than in the last."""
    whole, plain = draw(pipe), draw(pipe, guidance_scale=1.0)
    np.testing.assert_array_equal(draw(pipe, guidance_start=0.0, guidance_end=1.0), whole)
    parts = [draw(pipe, **part) for part in ({"guidance_end": 0.7}, {"guidance_start": 0.3})]
    for image in (whole, plain, parts[1]):
        assert difference(parts[0], image) > 2
    two = {"steps": 2, "sampler": "euler"}
    steps = pipe.settings(**two, guidance_end=0.5).guided_steps, pipe.settings(**two).guided_steps
    assert steps == (range(1), range(2))


def test_first_index_addresses_the_noise(pipe):
    images = draw(pipe, ["a cat"] * 3)
    np.testing.assert_array_equal(draw(pipe, ["a cat"] * 2, first_index=1), images[1:])
    assert difference(images[0], images[1]) > 8


def test_latents_stand_in_for_the_noise_of_the_seed(pipe):
    np.testing.assert_array_equal(draw(pipe, seed=3, latents=start_latents(7, 3)), draw(pipe, seed=7))


def test_bfloat16_draws_nearly_the_same(folder, pipe):
    half = engine.load(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.model.unet.params)} == {jnp.dtype("bfloat16")}
    error = draw(half).astype(float) - draw(pipe)
    assert 0 < np.sqrt(np.mean(error**2)) < 10


# ---- guidance


def test_guidance_away_from_the_prompt_itself_is_no_guidance(pipe):
    """D_uncond + w (D_cond - D_uncond) is D_cond where both are the same."""
    plain = draw(pipe, guidance_scale=1.0)
    assert difference(draw(pipe, negative_prompts=PROMPTS, guidance_scale=6.0), plain) <= 1


def test_guidance_zero_draws_the_negative_prompts(pipe):
    negatives = ["a dog", "grass", "a tree"]
    drawn = draw(pipe, negative_prompts=negatives, guidance_scale=0.0)
    assert difference(drawn, draw(pipe, negatives, guidance_scale=1.0)) <= 1


def test_one_negative_prompt_for_all_or_one_for_each(pipe):
    for_all = draw(pipe, negative_prompts="grass")
    np.testing.assert_array_equal(for_all, draw(pipe, negative_prompts=["grass"] * 3))
    none = draw(pipe)
    np.testing.assert_array_equal(none, draw(pipe, negative_prompts=""))
    assert difference(for_all, none) > 8
    np.testing.assert_array_equal(draw(pipe, negative_prompts=["", "grass", ""])[[0, 2]], none[[0, 2]])


# ---- samplers and segments


@pytest.fixture(scope="module")
def by_sampler(pipe):
    return {name: draw(pipe, sampler=name) for name in samplers.SAMPLERS}


def test_every_sampler_draws_a_picture_of_its_own(pipe, by_sampler):
    """Euler in sigma is DDIM, with noise as without: on one grid, which `leading` gives them, they agree."""
    assert all(images.std() > 20 for images in by_sampler.values())
    agree = ({"ddim", "euler"}, {"ddpm", "euler_ancestral"})
    for a, b in itertools.combinations(by_sampler, 2):
        assert (difference(by_sampler[a], by_sampler[b]) <= 1) == ({a, b} in agree), (a, b)
    np.testing.assert_array_equal(by_sampler["dpmpp_2m"], draw(pipe))  # the one that the folder names


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "pndm"])  # what there is to carry: all of it
def test_segments_carry_on_where_the_last_one_ended(folder, by_sampler, sampler, monkeypatch):
    monkeypatch.setattr(programs, "segment_length", lambda steps: steps)
    assert difference(draw(engine.load(folder), sampler=sampler), by_sampler[sampler]) <= 1


def test_the_options_of_the_folders_scheduler_reach_its_sampler(folder, monkeypatch):
    seen, unipc = set(), samplers.SAMPLERS["unipc"]

    def spy(*args, **options):
        seen.add(tuple(options.items()))
        return unipc.make(*args, **options)

    monkeypatch.setitem(samplers.SAMPLERS, "unipc", unipc._replace(make=spy))
    draw(engine.load(folder), sampler="unipc", steps=1)
    assert seen == {(("solver_order", 2), ("solver_type", "bh2"))}


def test_a_grid_stands_in_for_that_of_the_folders_scheduler(folder, pipe):
    options = {"steps": STEPS, "sampler": "euler"}
    trailing = dataclasses.replace(pipe.model.scheduler, timestep_spacing="trailing")
    other = Pipeline(
        dataclasses.replace(pipe.model, scheduler=trailing), pipe.devices, "other", "float32", folder
    )
    ours = draw(pipe, grid="trailing", **options)
    np.testing.assert_array_equal(ours, draw(other, **options))
    assert not np.array_equal(ours, draw(pipe, **options))
    assert not np.array_equal(ours, draw(pipe, grid="karras", **options))


def test_segment_length():
    for steps in range(1, 1001):
        length = segment_length(steps)
        assert steps % length == 0
        assert length == 1 or steps // length >= 8
        longer = (n for n in range(length + 1, steps + 1) if steps % n == 0 and steps // n >= 8)
        assert not any(longer)


# ---- the stream


def test_stream_is_generate_batch_by_batch(pipe):
    prompts = [*PROMPTS, "a dog", "grass"]
    batches = stream(pipe, prompts)
    assert [batch.first for batch in batches] == [0, 3]
    assert [batch.spoilt for batch in batches] == [[], []]
    np.testing.assert_array_equal(np.concatenate([b.images for b in batches]), draw(pipe, prompts))


@pytest.mark.parametrize("sampler, steps, total", [("dpmpp_2m", 3, 3), ("heun", 3, 5), ("pndm", 3, 4)])
def test_progress_adds_up_to_the_steps_of_the_sampler(pipe, sampler, steps, total):
    told = []
    stream(pipe, PROMPTS * 2, sampler=sampler, steps=steps, progress=told.append)
    assert told == [1] * total * 2


def test_frames_lead_from_static_to_picture(pipe):
    (batch,) = stream(pipe, frames=4)
    assert batch.frames.noisy.shape == batch.frames.denoised.shape == (3, 4, 16, 16, 3)
    assert difference(batch.images, draw(pipe)) <= 1
    np.testing.assert_array_equal(batch.frames.noisy[:, -1], batch.images)
    np.testing.assert_array_equal(batch.frames.denoised[:, -1], batch.images)
    vae = pipe.model.vae
    static = module(vae, vae.params).decode(jnp.asarray(start_latents(7, 3)) / vae.config.scaling_factor)
    assert difference(batch.frames.noisy[:, 0], np.asarray(to_uint8(static))) <= 1
    for a, b in itertools.pairwise(range(4)):
        assert difference(batch.frames.noisy[:, a], batch.frames.noisy[:, b]) > 8


def test_a_few_of_many_frames(pipe):
    (all_of_them,), (some,), (one,) = (stream(pipe, frames=count) for count in (4, 2, 1))
    np.testing.assert_array_equal(some.frames.denoised, all_of_them.frames.denoised[:, [0, -1]])
    np.testing.assert_array_equal(one.frames.noisy, all_of_them.frames.noisy[:, :1])


def test_what_words_steer_is_each_pictures_own(pipe):
    """Beside others or alone, with frames or without; and the picture is the one that nobody watched."""
    (batch,) = stream(pipe, heat=True)
    assert batch.heat.shape == (3, 8, 8, pipe.model.tokenizer.model_max_length)
    np.testing.assert_allclose(batch.heat.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(batch.images, draw(pipe))
    (with_frames,) = stream(pipe, heat=True, frames=2)
    np.testing.assert_array_equal(with_frames.heat, batch.heat)
    (alone,) = stream(pipe, PROMPTS[1:2], heat=True, first_index=1)
    np.testing.assert_allclose(alone.heat[0], batch.heat[1], atol=1e-5)
    assert np.abs(batch.heat[0] - batch.heat[1]).max() > 1e-3
    assert stream(pipe)[0].heat is None


def test_one_step_shows_nothing_of_words(pipe):
    with pytest.raises(UserError, match=r"behind the first step.*write more steps$"):
        stream(pipe, heat=True, steps=1)


def test_nan_is_told_of_the_picture_that_it_struck(pipe):
    latents = start_latents(7, 3)
    whole = draw(pipe, latents=latents)
    latents[1, 2, 3, 0] = np.nan
    (batch,) = stream(pipe, latents=latents)
    assert batch.spoilt == [1]
    np.testing.assert_array_equal(batch.images[[0, 2]], whole[[0, 2]])
    with pytest.raises(FloatingPointError, match=r"index \[11\] of seed 7"):
        draw(pipe, latents=latents, first_index=10)


# ---- bad arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": []}, "at least one string"),
        ({"negative_prompts": ["a", "b"]}, "2 negative prompts for 3 prompts"),
        ({"steps": 0}, "steps=0 is out of range; write 1 to 1000"),
        ({"steps": 1001}, "steps=1001 is out of range"),
        ({"sampler": "eular"}, r"sampler='eular' is unknown \(did you mean euler\?\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"height": 17}, "height=17: this model makes multiples of 2; write 16"),
        ({"width": 0}, "width=0.*write 2"),
        ({"height": 10**6}, "height=1000000.*write 16384"),
        ({"batch_size": 0}, "batch_size=0: write 1 or more"),
        ({"grid": "karas"}, r"grid='karas' is not supported \(did you mean karras\?\)"),
        ({"guidance_start": -0.5}, "guidance_start=-0.5: write a share of the steps, from 0 to 1"),
        ({"guidance_end": 1.5}, "guidance_end=1.5: write a share"),
        ({"guidance_end": float("nan")}, "guidance_end=nan: write a share"),
        ({"guidance_end": 0.1}, "guidance_start=0.0 and guidance_end=0.1 leave none of 3 steps between"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5: write a share of the contrast, from 0 to 1"),
        ({"cache_interval": 0}, "cache_interval=0: write a number of steps, from 1"),
        ({"merge_tokens": 0.8}, "merge_tokens=0.8: write a share of the tokens, from 0 to 0.75"),
        ({"refiner_start": 0.5}, "refiner_start=0.5 without a refiner: write --refiner FOLDER"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"first_index": -1}, "image index -1 is out of range"),
        ({"latents": np.zeros((3, 4, 4, 4), np.float32)}, r"shape \(3, 4, 4, 4\).*need \(3, 8, 8, 4\)"),
        ({"latents": np.zeros((2, 8, 8, 4), np.float32)}, r"shape \(2, 8, 8, 4\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named(pipe, options, message):
    with pytest.raises(UserError, match=message) as error:
        draw(pipe, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float31"}, "dtype='float31' is unknown.*write float32 or bfloat16"),
        ({"parallel": "pmaps"}, r"parallel='pmaps' is unknown \(did you mean pmap\?\)"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_of_load_is_named(folder, options, message):
    with pytest.raises(UserError, match=message):
        engine.load(**{"model": folder} | options)


def test_what_is_not_read_of_prompts_is_told(pipe):
    with pytest.warns(UserNotice, match="prompt too long"):
        draw(pipe, ["a fox " * 40] * 2)


def test_more_stages_than_steps_are_refused(pipe):
    with pytest.raises(UserError, match="frames=9 is out of range; from static to picture: write 2 to 4"):
        next(stream(pipe, frames=9))


def test_files_without_scales_are_a_mistake():
    for entries in ("x.safetensors", ["x.safetensors"], [("x.safetensors",)]):
        with pytest.raises(UserError, match=r"lora=.*: write files and scales, as lora=\[\('FILE"):
            check_scaled("lora", entries)
    check_scaled("lora", [("x.safetensors", 0.5)])


def test_what_the_package_gives_by_name():
    assert engine.Given().image is None and engine.fresh_seed() != engine.fresh_seed()
    with pytest.raises(AttributeError, match="has no attribute 'gvien'"):
        engine.gvien  # noqa: B018


# ---- the compilation cache


@pytest.fixture
def cache_folder():
    """jax.config's, put back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_what_is_special_on_the_way_has_one_list():
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert set(OF_THE_WAY) == OfTheWay.__annotations__.keys() <= fields


def test_another_share_of_the_contrast_compiles_nothing(pipe):
    first = draw(pipe, guidance_rescale=0.7)
    before = COMPILED.copy()
    assert (draw(pipe, guidance_rescale=0.3) != first).any() and before == COMPILED
    np.testing.assert_array_equal(draw(pipe, guidance_rescale=0.0), draw(pipe))


def test_compiled_programs_are_kept_in_the_cache_folder_of_the_user(cache_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    loading.use_compilation_cache()
    assert pathlib.Path(cache_folder()).name == "fogsculpt"


def test_a_cache_folder_that_was_chosen_stays(cache_folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    loading.use_compilation_cache()
    assert cache_folder() == str(tmp_path)
