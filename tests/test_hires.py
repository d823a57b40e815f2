"""Pictures that are drawn over at a larger size; against PyTorch diffusers: tests/parity/test_table.py."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import engine
from engine.diffusion import noise
from engine.requests import Given, Settings
from engine.types import UserError
from tests.compiled import COMPILED
from tests.tiny import REFINER, XL, shallow, tiny_controlnet, tiny_folder
from tests.upscalers import Compact, randomised, tiny_upscaler

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS, STEPS, SEED = ["a red fox", "a blue car", "a cat"], 4, 7
HIRES = {"hires": 2, "hires_strength": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", **shallow({}))


@pytest.fixture(scope="module")
def pipe(folder):
    return engine.load(folder)


def draw(pipe, prompts=PROMPTS, **options):
    return pipe.generate(prompts, **{"seed": SEED, "steps": STEPS, "batch_size": 3} | options)


def over(pipe, images, prompts=PROMPTS, first_index=0, strength=0.5, **options):
    """Pictures drawn over by hand."""
    height, width = images.shape[1:3]
    indices = range(first_index, first_index + len(prompts))
    keys = noise.larger_keys(noise.image_keys(SEED, indices))
    latents = np.asarray(noise.initial_noise(keys, (height // 2, width // 2, 4)))
    given = [Given(image) for image in images]
    return draw(
        pipe, prompts, height=height, width=width, latents=latents, given=given, strength=strength, **options
    )


def by_pillow(images, height, width):
    size = width, height
    return np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.LANCZOS)) for x in images])


def difference(a, b):
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize("height, width", [(64, 48), (40, 40), (20, 12), (40, 24)])
def test_sizes_are_those_of_pillow(pipe, height, width):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 24, 3), dtype=np.uint8)
    sized = np.asarray(pipe.sizing(jnp.asarray(images), height, width))
    assert sized.shape == (2, height, width, 3)
    assert difference(sized, by_pillow(images, height, width)) <= 1


def test_it_is_the_picture_enlarged_and_drawn_over(pipe):
    found = draw(pipe, **HIRES)
    assert found.shape == (3, 32, 32, 3)
    small = draw(pipe)
    large = np.asarray(pipe.sizing(jnp.asarray(small), 32, 32))
    assert difference(found, over(pipe, large)) <= 1
    assert difference(found, large) > 8
    more = draw(pipe, hires=2, hires_strength=0.25, hires_steps=8)
    assert difference(more, over(pipe, large, strength=0.25, steps=8)) <= 1


def test_sides_are_multiples_of_eight():
    sizes = [Settings(1, "ddim", 1.0, 16, 24, 1, hires=factor).size for factor in (None, 1, 1.3, 1.7)]
    assert sizes == [(16, 24), (16, 24), (24, 32), (24, 40)]


def test_a_factor_of_one_is_none(pipe):
    np.testing.assert_array_equal(draw(pipe, hires=1), draw(pipe))


def test_a_picture_does_not_depend_on_those_beside_it(pipe):
    together = draw(pipe, **HIRES)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = draw(pipe, [prompt], first_index=i, **HIRES)
        assert difference(alone, together[i]) <= 1


def test_another_prompt_seed_or_factor_of_guidance_compiles_nothing(pipe):
    draw(pipe, **HIRES)
    before = COMPILED.copy()
    draw(pipe, PROMPTS[::-1], guidance_scale=3.0, **HIRES, seed=9)
    assert before == COMPILED


@pytest.mark.parametrize("sampler, steps", [("ddim", 3), ("heun", 4), ("euler_ancestral", 5)])
def test_frames_go_from_static_over_both_to_the_picture(pipe, sampler, steps):
    settings = pipe.settings(steps, sampler, batch_size=3, hires=2, hires_strength=0.7)
    most, told = pipe.steps_of(settings) + 1, []
    (batch,) = pipe.stream(PROMPTS, None, settings, seed=SEED, frames=most, progress=told.append)
    assert sum(told) == most - 1 > steps
    noisy, denoised = batch.frames
    assert noisy.shape == denoised.shape == (3, most, 32, 32, 3)
    np.testing.assert_array_equal(noisy[:, -1], batch.images)
    np.testing.assert_array_equal(denoised[:, -1], batch.images)
    alone = pipe.settings(steps, sampler, batch_size=3)
    first = pipe.steps_of(alone) + 1
    (small,) = pipe.stream(PROMPTS, None, alone, seed=SEED, frames=first)
    for mine, theirs in zip(batch.frames, small.frames, strict=True):
        for stage in range(first):
            assert difference(mine[:, stage], by_pillow(theirs[:, stage], 32, 32)) <= 1
    assert all((noisy[:, i] != noisy[:, i + 1]).any() for i in range(most - 1))
    (few,) = pipe.stream(PROMPTS, None, settings, seed=SEED, frames=2)
    np.testing.assert_array_equal(few.frames.denoised, denoised[:, [0, -1]])


def test_words_are_watched_where_the_whole_is_drawn(pipe):
    settings = {"batch_size": 3}
    seen = [
        pipe.stream(PROMPTS, None, pipe.settings(STEPS, **settings, **more), seed=SEED, heat=True)
        for more in ({}, HIRES)
    ]
    (alone,), (larger,) = seen
    np.testing.assert_array_equal(alone.heat, larger.heat)
    assert larger.images.shape == (3, 32, 32, 3)


@pytest.mark.parametrize("hires", [2, 1.5])
def test_an_upscaler_enlarges_what_is_drawn_over(folder, pipe, tmp_path, hires):
    """And not what comes of it, by its own factor, 3; the rest of the way is a filter's."""
    with_net = engine.load(folder, upscaler=tiny_upscaler(tmp_path / "net.safetensors", scale=3))
    side = int(16 * hires)
    large = np.asarray(with_net.sizing(jnp.asarray(draw(with_net)), side, side))
    found = draw(with_net, **HIRES | {"hires": hires})
    assert found.shape == (3, side, side, 3)
    assert difference(found, over(pipe, large)) <= 1
    assert difference(found, draw(pipe, **HIRES | {"hires": hires})) > 8


def test_a_controlnet_sees_its_picture_at_both_sizes(folder, tmp_path):
    net = tiny_controlnet(tmp_path / "net", **shallow({})["unet"])
    pipe = engine.load(folder, controlnet=[(net, 1.0)])
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = draw(pipe, given=[Given(control=(picture,)) for picture in pictures], **HIRES)
    reduced = np.asarray(pipe.sizing(jnp.asarray(pictures), 16, 16))
    small = draw(pipe, given=[Given(control=(picture,)) for picture in reduced])
    large = np.asarray(pipe.sizing(jnp.asarray(small), 32, 32))
    keys = noise.larger_keys(noise.image_keys(SEED, range(3)))
    given = [Given(image, control=(picture,)) for image, picture in zip(large, pictures, strict=True)]
    latents = np.asarray(noise.initial_noise(keys, (16, 16, 4)))
    by_hand = draw(pipe, given=given, height=32, width=32, latents=latents, strength=0.5)
    assert difference(found, by_hand) <= 1
    with pytest.raises(UserError, match=r"control picture of shape \(16, 16, 3\): it must be \(32, 32, 3\)"):
        draw(pipe, given=[Given(control=(picture,)) for picture in reduced], **HIRES)


def test_a_refiner_goes_the_end_of_both(tmp_path):
    base = tiny_folder(tmp_path / "base", **shallow(XL))
    refiner = tiny_folder(tmp_path / "refiner", seed=1, **shallow(REFINER))
    pipe = engine.load(base, refiner=refiner)
    small = draw(pipe, refiner_start=0.6)
    found = draw(pipe, refiner_start=0.6, **HIRES | {"hires_strength": 0.8})
    large = np.asarray(pipe.sizing(jnp.asarray(small), 32, 32))
    assert difference(found, over(pipe, large, strength=0.8, refiner_start=0.6)) <= 1
    with pytest.raises(UserError, match=r"^hires=2: refiner_start=0.6 leaves none of 1 steps to the model"):
        draw(pipe, refiner_start=0.6, **HIRES | {"hires_strength": 0.25})


PICTURE = Given(np.zeros((16, 16, 3), np.uint8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hires": 0.5}, "hires=0.5: write a factor from 1, which is none, to 16"),
        ({"hires": float("nan")}, "hires=nan: write a factor"),
        ({"hires": 2, "hires_strength": 0.0}, "hires_strength=0.0: write a number above 0 and up to 1"),
        ({"hires": 2, "hires_strength": 1.5}, "hires_strength=1.5: write a number above 0"),
        ({"hires": 2, "hires_strength": 0.2}, "hires_strength=0.2 takes none of 4 steps: write 0.25 or more"),
        ({"hires": 2, "hires_steps": 0}, "hires_steps=0 is out of range; write 1 to 1000"),
        ({"hires_steps": 3}, "hires_steps=3 without a larger picture: write --hires 2, too"),
        ({"hires": 16, "height": 2048}, "hires=16 makes 256 x 32768 pixels of 16 x 2048; this model makes"),
        ({"hires": 2, "given": [PICTURE] * 3}, "hires=2 is for pictures that are drawn from noise alone"),
    ],
)
def test_mistakes_are_one_line(pipe, options, message):
    with pytest.raises(UserError) as error:
        draw(pipe, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_changes_pictures_has_nothing_to_begin_with(tmp_path):
    pipe = engine.load(tiny_folder(tmp_path / "model", **shallow({"unet": {"in_channels": 8}})))
    with pytest.raises(UserError, match="this model changes pictures, and there is none"):
        draw(pipe, **HIRES)


def test_what_an_upscaler_spoils_is_told(folder, tmp_path):
    state = randomised(Compact()).state_dict()
    state["body.0.bias"][0] = np.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(FloatingPointError, match=r"index \[0, 1, 2\] of seed 7"):
        draw(engine.load(folder, upscaler=tmp_path / "nan.safetensors"), **HIRES)
