"""A folder that the engine wrote draws the same picture in PyTorch diffusers, from the same start latents."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import engine
from configs import scenes
from tests.parity.common import nchw
from tests.tiny import TINY_VAE, compiled_quickly, tiny_folder

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"steps_offset": 1, "set_alpha_to_one": False}
SCHEDULERS = {
    "Stable Diffusion 1.5": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SCALED, **LEADING},
    "Stable Diffusion 2.1": {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        **SCALED,
        **LEADING,
    },
    "Euler": {"_class_name": "EulerDiscreteScheduler", **SCALED},
    "shipped": scenes.get_config().scheduler,
}
PROMPTS = ["a red fox at night", "a cat above a dog"]
NEGATIVES = ["a blue car", ""]
STEPS = 10


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    with compiled_quickly():
        yield


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of uint8 pictures."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def draw_in_pytorch(folder, latents: np.ndarray, tiles: bool = False, **options) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if tiles:
        pipeline.vae.enable_tiling()
    images = pipeline(PROMPTS, latents=torch.from_numpy(nchw(latents).copy()), output_type="np", **options)
    return np.round(images.images * 255).astype(np.uint8)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_picture_as_pytorch(name, tmp_path):
    folder = tiny_folder(tmp_path / "model", scheduler=SCHEDULERS[name])
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    ours = engine.load(folder).generate(PROMPTS, NEGATIVES, steps=STEPS, guidance_scale=4.0, latents=latents)
    theirs = draw_in_pytorch(
        folder, latents, negative_prompt=NEGATIVES, num_inference_steps=STEPS, guidance_scale=4.0
    )
    assert theirs.std() > 30  # a picture, not one colour
    assert psnr(ours, theirs) >= 40
    assert psnr(ours[::-1], theirs) < 20  # another picture is told apart


LCM = {"_class_name": "LCMScheduler", **SCALED, **LEADING}


@pytest.mark.parametrize(("scheduler", "steps"), [(SCHEDULERS["Euler"], STEPS), (LCM, 1)])
def test_same_picture_of_a_model_with_guidance_in_its_time(scheduler, steps, tmp_path):
    """As LCMs have it: one pass a step, whatever the scale, which is not that of no guidance."""
    folder = tiny_folder(tmp_path / "model", unet={"time_cond_proj_dim": 16}, scheduler=scheduler)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    pipe = engine.load(folder)
    ours, weaker = (
        pipe.generate(PROMPTS, steps=steps, guidance_scale=w, latents=latents) for w in (4.0, 1.0)
    )
    theirs = draw_in_pytorch(folder, latents, num_inference_steps=steps, guidance_scale=4.0)
    assert psnr(ours, theirs) >= 45
    assert psnr(weaker, theirs) < 40


def test_same_picture_without_guidance(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    latents = np.random.default_rng(1).standard_normal((2, 8, 8, 4), np.float32)
    ours = engine.load(folder).generate(PROMPTS, steps=STEPS, guidance_scale=1.0, latents=latents)
    theirs = draw_in_pytorch(folder, latents, num_inference_steps=STEPS, guidance_scale=1.0)
    assert psnr(ours, theirs) >= 40


def test_same_picture_with_a_tiny_autoencoder(tmp_path):
    """PyTorch reads the class from what the engine wrote, and so does the engine."""
    folder = tiny_folder(tmp_path / "model", vae=TINY_VAE)
    latents = np.random.default_rng(2).standard_normal((2, 8, 8, 4), np.float32)
    pipe = engine.load(folder)
    assert type(pipe.model.vae.config).__name__ == "AutoencoderTinyConfig"
    ours = pipe.generate(PROMPTS, NEGATIVES, steps=STEPS, guidance_scale=4.0, latents=latents)
    theirs = draw_in_pytorch(
        folder, latents, negative_prompt=NEGATIVES, num_inference_steps=STEPS, guidance_scale=4.0
    )
    assert theirs.std() > 30
    assert psnr(ours, theirs) >= 40
    assert psnr(ours[::-1], theirs) < 20


def test_same_picture_in_tiles(tmp_path):
    """Of 16 pixels, which is sample_size of the autoencoder: that of the tiles in PyTorch."""
    folder = tiny_folder(tmp_path / "model")
    latents = np.random.default_rng(3).standard_normal((2, 12, 20, 4), np.float32)
    ours = engine.load(folder, tile=16).generate(
        PROMPTS, steps=STEPS, guidance_scale=1.0, latents=latents, height=24, width=40
    )
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 24, "width": 40}
    theirs = draw_in_pytorch(folder, latents, tiles=True, **options)
    assert psnr(ours, theirs) >= 45
    assert psnr(ours, draw_in_pytorch(folder, latents, **options)) < 40  # decoded whole
