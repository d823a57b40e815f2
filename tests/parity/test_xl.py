"""SDXL: the same picture as PyTorch diffusers draws, from the same start latents."""

import diffusers
import numpy as np
import pytest
import torch

import engine
from tests.parity.common import nchw
from tests.parity.test_pipeline import NEGATIVES, PROMPTS, SCHEDULERS, STEPS, psnr
from tests.tiny import XL, compiled_quickly, tiny_folder


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
