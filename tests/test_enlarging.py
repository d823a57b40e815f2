"""An upscaler behind a tiny model: what a picture depends on, tiles, and what is compiled."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import engine
from engine import enlarging
from engine.requests import Given, Request
from tests.compiled import COMPILED
from tests.parity.common import nchw
from tests.tiny import shallow, tiny_folder
from tests.upscalers import Compact, randomised, tiny_upscaler

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS, STEPS, SCALE = ["a red fox", "a blue car", "a cat"], 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", **shallow({}))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny_upscaler(tmp_path_factory.mktemp("upscaler") / "net.safetensors", scale=SCALE)


@pytest.fixture(scope="module")
def plain(folder):
    return engine.load(folder)


@pytest.fixture(scope="module")
def pipe(folder, file):
    return engine.load(folder, upscaler=file)


def draw(pipe, prompts=PROMPTS, **options):
    return pipe.generate(prompts, **{"seed": 7, "steps": STEPS, "batch_size": 3} | options)


def test_pictures_are_what_pytorch_makes_of_those_without_it(plain, pipe):
    small, large = draw(plain), draw(pipe)
    assert pipe.enlarging.scale == SCALE and large.shape == (3, 16 * SCALE, 16 * SCALE, 3)
    with torch.no_grad():
        x = torch.from_numpy(nchw(small).copy()).float() / 255
        expected = randomised(Compact(scale=SCALE))(x).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    assert np.abs(large - 255 * expected).max() <= 0.51


def test_a_picture_does_not_depend_on_those_beside_it(pipe):
    together = draw(pipe)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = draw(pipe, [prompt], first_index=i)
        np.testing.assert_array_equal(alone, together[i])


def test_another_prompt_or_seed_compiles_nothing(pipe):
    draw(pipe)
    before = COMPILED.copy()
    draw(pipe, PROMPTS[::-1], seed=9)
    assert before == COMPILED


def test_tiles(folder, file, pipe, monkeypatch):
    """32 pixels of what comes out are 8 of what goes in; where one tile is alone, all is the same."""
    tiles = []
    decode = enlarging.decode_in_tiles
    monkeypatch.setattr(
        enlarging,
        "decode_in_tiles",
        lambda net, x, tile, scale: (tiles.append(tile), decode(net, x, tile, scale))[1],
    )
    tiled = engine.load(folder, tile=32, upscaler=file)
    found, whole = draw(tiled).astype(int), draw(pipe)
    assert tiles == [8] and found.shape == whole.shape
    assert (found != whole).any()  # at the seams, of this network of noise
    np.testing.assert_array_equal(found[:, :9, :9], whole[:, :9, :9])  # no tile but the first


def test_what_a_mask_keeps_is_pasted_before(folder, file, pipe, plain):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.float32)
    mask[:8] = 1
    given = [Given(image, mask)] * 3
    small = draw(plain, given=given)
    np.testing.assert_array_equal(small[:, 8:], np.stack([image[8:]] * 3))
    large = draw(pipe, given=given)
    np.testing.assert_array_equal(large[0, -1], large[1, -1])  # far from what is drawn


def test_frames_and_heat_are_of_what_is_drawn(pipe):
    settings = pipe.settings(3, batch_size=1)
    (batch,) = pipe.stream(PROMPTS[:1], None, settings, seed=7, frames=2, heat=True)
    assert batch.images.shape == (1, 48, 48, 3)
    assert batch.frames.noisy.shape == (1, 2, 16, 16, 3) and batch.heat.shape[1:3] == (8, 8)


def test_jobs_get_them_too_and_a_nan_stays_one(pipe):
    settings = pipe.settings(STEPS, batch_size=3)
    contexts = pipe.encode([*PROMPTS, ""], 3)
    spoilt = contexts[PROMPTS[1]]
    contexts = {**contexts, PROMPTS[1]: spoilt._replace(words=np.full_like(spoilt.words, np.nan))}
    requests = [Request(prompt, "", 7, i, settings.guidance_scale) for i, prompt in enumerate(PROMPTS)]
    images, finite, *_ = pipe.dispatch(requests, contexts, settings)
    assert np.asarray(finite).tolist() == [True, False, True]
    np.testing.assert_array_equal(np.asarray(images)[[0, 2]], draw(pipe)[[0, 2]])


def test_an_upscaler_that_makes_a_nan_is_told(folder, tmp_path):
    state = randomised(Compact()).state_dict()
    state["body.0.bias"][0] = np.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(FloatingPointError, match=r"index \[0, 1, 2\] of seed 7"):
        draw(engine.load(folder, upscaler=tmp_path / "nan.safetensors"))


def test_bfloat16_on_a_cpu_is_stored_and_float32_computed(folder, file, pipe):
    half = engine.load(folder, "bfloat16", upscaler=file)
    assert {str(leaf.dtype) for leaf in _leaves(half)} == {"bfloat16"}
    assert draw(half).shape == (3, 48, 48, 3)


def _leaves(pipe):
    return jax.tree.leaves(pipe.enlarging._upscaler.params)
