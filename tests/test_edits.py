"""Pictures that are given beside the words, on a tiny model; against PyTorch: tests/parity/test_edits.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import engine
from engine import edits
from engine.diffusion import noise, samplers
from engine.requests import Given
from engine.types import UserError
from tests.compiled import COMPILED
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS = ["a red fox", "a blue car", "a cat"]
STEPS = 4


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return engine.load(tiny_folder(tmp_path_factory.mktemp("tiny") / "model"))


def picture(seed: int) -> np.ndarray:
    """Of 4 x 4 px squares: neither what the tiny model draws nor lost on its autoencoder."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return squares.repeat(4, axis=0).repeat(4, axis=1)


def half(anew: float = 1.0) -> np.ndarray:
    """A mask of the upper half."""
    mask = np.zeros((16, 16), np.float32)
    mask[:8] = anew
    return mask


def draw(pipe, given, prompts=PROMPTS, **options):
    return pipe.generate(prompts, given=given, **{"seed": 7, "steps": STEPS, "batch_size": 3} | options)


def test_the_weaker_the_nearer(pipe):
    """To what the autoencoder makes of the given picture."""
    given = [Given(picture(i)) for i in range(3)]
    known = pipe.programs.look_program(pipe.model.vae.params, edits.pixels(given))["known"]
    same = np.asarray(pipe.programs.decoder_program(pipe.model.vae.params, known)[0]).astype(int)
    away = [np.abs(draw(pipe, given, strength=s) - same).mean() for s in (0.25, 0.5, 1.0)]
    assert away[0] < away[1] < away[2]
    assert np.array_equal(draw(pipe, given, strength=1.0), draw(pipe, None))  # forgotten
    assert np.array_equal(draw(pipe, given), draw(pipe, given, strength=edits.STRENGTH))


def test_what_a_mask_keeps_stays_bit_for_bit(pipe):
    given = [Given(picture(i), half()) for i in range(3)]
    drawn, before = draw(pipe, given), np.stack([edit.image for edit in given])
    np.testing.assert_array_equal(drawn[:, 8:], before[:, 8:])
    assert np.abs(drawn[:, :8].astype(int) - before[:, :8]).mean() > 10
    mixed = draw(pipe, [edit._replace(mask=half(0.75)) for edit in given])
    expected = np.round(0.75 * drawn[:, :8].astype(np.float32) + 0.25 * before[:, :8])
    assert np.abs(mixed[:, :8] - expected).max() <= 1


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_any_sampler_leaves_what_is_known_at_every_sigma(name):
    """known + sigma eps, with one eps at all sigmas where the sampler adds none; and known in the end."""
    known, mask = jnp.full((1, 4, 4, 2), 0.7), jnp.zeros((1, 4, 4, 1)).at[:, :2].set(1)
    sigmas, keys = jnp.array([9.0, 5.0, 2.0, 0.7, 0.0]), noise.image_keys(1, [0])
    eps = jax.random.normal(jax.random.key(0), known.shape)
    denoise = edits.keeping(lambda x, sigma: jnp.tanh(x), {"mask": mask, "known": known})
    x, trace = samplers.sample(name, denoise, known + sigmas[0] * eps, sigmas, keys)
    np.testing.assert_allclose(x[:, 2:], known[:, 2:], atol=1e-5)
    assert np.abs(x[:, :2] - known[:, :2]).max() > 0.1
    if not samplers.SAMPLERS[name].stochastic:
        slopes = (trace.x[:-1, :, 2:] - known[:, 2:]) / eps[:, 2:]
        np.testing.assert_allclose(slopes, slopes[:, :1, :1, :1, :1] * jnp.ones_like(slopes), rtol=1e-3)


def test_a_latent_is_drawn_anew_where_any_of_its_pixels_is(pipe):
    mask = np.zeros((16, 16), np.float32)
    mask[5, 11], mask[0, 0] = 0.6, 0.4
    found = pipe.programs.look_program(pipe.model.vae.params, edits.pixels([Given(picture(0), mask)] * 3))[
        "mask"
    ]
    assert np.argwhere(np.asarray(found)[0, ..., 0]).tolist() == [[2, 5]]


def test_a_picture_does_not_depend_on_those_beside_it(pipe):
    given = [Given(picture(i), half()) for i in range(3)]
    together = draw(pipe, given)
    alone = draw(pipe, given[2:], PROMPTS[2:], first_index=2)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1


def test_another_picture_mask_or_prompt_compiles_nothing(pipe):
    draw(pipe, [Given(picture(i), half()) for i in range(3)], strength=0.5)
    before = COMPILED.copy()
    draw(pipe, [Given(picture(i + 9), 1 - half()) for i in range(3)], PROMPTS[::-1], strength=0.5, seed=3)
    assert before == COMPILED


@pytest.mark.parametrize(
    "given, options, message",
    [
        ([Given(picture(0)[:8])] * 3, {}, r"a picture of shape \(8, 16, 3\): it must be \(16, 16, 3\)"),
        ([Given(picture(0), half()[:4])] * 3, {}, r"a mask of shape \(4, 16\): its picture has \(16, 16\)"),
        ([Given(picture(0)), Given(picture(0), half()), Given(picture(0))], {}, "one after the other"),
        ([Given(picture(0))] * 3, {"strength": 0.0}, "strength=0.0: write a number above 0"),
        ([Given(picture(0))] * 3, {"strength": 1.5}, "strength=1.5: write a number above 0 and up to 1"),
        (None, {"strength": 0.5}, "strength=0.5 with nothing to start from: leave it out"),
        ([Given(picture(0) / 255)] * 3, {}, "a picture of float64: write an array of uint8"),
        ([Given(Image.fromarray(picture(0)))] * 3, {}, "a picture of Image: write an array of uint8"),
        ([Given(picture(0), 255 * half())] * 3, {}, "a mask from 0.0 to 255.0: write numbers from 0 to 1"),
        ([Given(picture(0), half().astype(np.uint8))] * 3, {}, "a mask of uint8: write an array of floats"),
        ([Given(picture(0))] * 2, {}, "2 pictures for 3 prompts: give one for each"),
        ([Given(picture(0))] * 3, {"strength": 0.2}, r"takes none of 4 steps: write 0\.25 or more"),
    ],
)
def test_a_wrong_edit_is_one_line(pipe, given, options, message):
    with pytest.raises(UserError, match=message):
        draw(pipe, given, **options)


@pytest.mark.parametrize(
    "channels, given, strength, message",
    [
        (9, None, None, "write --image FILE --mask FILE"),
        (9, [Given(picture(0))], None, "nothing says which: write --mask FILE"),
        (8, None, None, "this model changes pictures, and there is none: write --image FILE"),
        (8, [Given(picture(0), half())], None, "leave out --mask"),
        (8, [Given(picture(0))], 0.5, "strength=0.5 with a model that starts from noise alone: leave it out"),
    ],
)
def test_models_made_for_pictures_say_what_they_need(channels, given, strength, message, tmp_path):
    pipe = engine.load(tiny_folder(tmp_path / "model", unet={"in_channels": channels}))
    with pytest.raises(UserError, match=message):
        pipe.generate(["a fox"], given=given, strength=strength, steps=2)


def test_channels_of_no_known_kind(tmp_path):
    with pytest.raises(UserError, match="the U-Net takes 7 channels for latents of 4; known are 4, 8, 9"):
        engine.load(tiny_folder(tmp_path / "model", unet={"in_channels": 7}))
