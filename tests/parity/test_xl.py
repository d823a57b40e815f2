"""SDXL: the same picture as PyTorch diffusers draws, from the same start latents."""

import diffusers
import numpy as np
import pytest
import torch

import engine
from tests.parity.common import nchw
from tests.parity.test_pipeline import NEGATIVES, PROMPTS, SCHEDULERS, STEPS, psnr
from tests.tiny import REFINER, XL, compiled_quickly, tiny_folder


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    with compiled_quickly():
        yield


def draw_in_pytorch(folder, latents, negatives, scale=4.0, steps=STEPS) -> np.ndarray:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}
    start = torch.from_numpy(nchw(latents).copy())
    drawn = pipeline(PROMPTS, latents=start, negative_prompt=negatives, **options).images
    return np.round(drawn * 255).astype(np.uint8)


@pytest.mark.parametrize("negatives", [NEGATIVES[0], None], ids=["negative prompt", "none"])
@pytest.mark.parametrize("name", ["Euler", "Stable Diffusion 2.1"])
def test_same_picture_as_pytorch(name, negatives, tmp_path):
    folder = tiny_folder(tmp_path / "model", **XL, scheduler=SCHEDULERS[name])
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    ours = engine.load(folder).generate(PROMPTS, negatives, steps=STEPS, guidance_scale=4.0, latents=latents)
    theirs = draw_in_pytorch(folder, latents, negatives)
    assert theirs.std() > 20
    assert psnr(ours, theirs) >= 45
    assert psnr(ours[::-1], theirs) < 25


@pytest.mark.parametrize("name", ["Euler", "shipped"])
def test_same_picture_with_a_refiner(name, tmp_path):
    folder = tiny_folder(tmp_path / "base", **XL, scheduler=SCHEDULERS[name])
    further = tiny_folder(tmp_path / "refiner", seed=1, **REFINER, scheduler=SCHEDULERS[name])
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    options = {"steps": STEPS, "guidance_scale": 4.0, "latents": latents}
    ours = engine.load(folder, refiner=further).generate(PROMPTS, NEGATIVES[0], refiner_start=0.4, **options)
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(further, vae=base.vae)
    how = {"negative_prompt": NEGATIVES[:1] * 2, "num_inference_steps": STEPS, "guidance_scale": 4.0}
    start = torch.from_numpy(nchw(latents).copy())
    half = base(PROMPTS, latents=start, denoising_end=0.4, output_type="latent", **how).images
    theirs = refiner(PROMPTS, image=half, denoising_start=0.4, output_type="np", **how).images
    theirs = np.round(theirs * 255).astype(np.uint8)
    assert theirs.std() > 20
    assert psnr(ours, theirs) >= 45
    assert psnr(ours, engine.load(folder).generate(PROMPTS, NEGATIVES[0], **options)) < 40
