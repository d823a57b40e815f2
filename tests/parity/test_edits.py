"""Pictures as input: the same picture as PyTorch diffusers draws, from the same start latents and noise."""

import diffusers
import numpy as np
import pytest
import torch

import engine
from engine.requests import Edit
from tests.parity.common import nchw
from tests.parity.test_pipeline import NEGATIVES, PROMPTS, SCHEDULERS, psnr
from tests.tiny import compiled_quickly, tiny_folder

STEPS, SCALE = 10, 4.0
EULER = SCHEDULERS["Euler"]
# name: the channels of the U-Net, the scheduler, whether there is a mask, the strength
ROWS = {
    "img2img, ddim, v": (4, SCHEDULERS["Stable Diffusion 2.1"], False, 0.7),
    "img2img, euler": (4, EULER, False, 0.5),
    "img2img, dpmpp_2m": (4, SCHEDULERS["shipped"], False, 0.8),
    "inpainting with any U-Net, ddim, v": (4, SCHEDULERS["Stable Diffusion 2.1"], True, 0.7),
    "inpainting with any U-Net, euler": (4, EULER, True, 0.6),
    "inpainting with any U-Net, dpmpp_2m": (4, SCHEDULERS["shipped"], True, 0.9),
    "inpainting U-Net": (9, SCHEDULERS["Stable Diffusion 2.1"], True, 1.0),
    "inpainting U-Net, half way": (9, EULER, True, 0.5),
    "instruct-pix2pix": (8, EULER, False, 1.0),
}
PIPELINES = {
    (4, False): diffusers.StableDiffusionImg2ImgPipeline,
    (4, True): diffusers.StableDiffusionInpaintPipeline,
    (9, True): diffusers.StableDiffusionInpaintPipeline,
    (8, False): diffusers.StableDiffusionInstructPix2PixPipeline,
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    with compiled_quickly():
        yield


@pytest.fixture
def certain(monkeypatch):
    """Latents are the means of their distributions in diffusers, too: the noise is then all that is drawn."""
    gaussian = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(gaussian, "sample", lambda self, generator=None: self.mean)


def given(masked: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Two pictures, smooth enough to be told apart, and masks along the cells of latents."""
    noise = np.random.default_rng(5).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    images = noise.repeat(4, axis=1).repeat(4, axis=2)
    if not masked:
        return images, None
    masks = np.zeros((2, 16, 16), np.float32)
    masks[0, 4:12, 2:10] = masks[1, :, 8:] = 1
    return images, masks


def in_pytorch(folder, channels, images, masks, strength, noise, monkeypatch) -> np.ndarray:
    pipeline = PIPELINES[channels, masks is not None].from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(nchw(noise).copy())
    module = __import__(type(pipeline).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise)
    options = {"guidance_scale": SCALE, "num_inference_steps": STEPS, "output_type": "np"}
    if channels != 8:
        options["strength"] = strength
    if masks is not None:
        options |= {"mask_image": torch.from_numpy(masks[:, None]), "height": 16, "width": 16}
    if channels == 8:
        options |= {"image_guidance_scale": 1.5}
    pictures = torch.from_numpy(nchw(images).astype(np.float32) / 255)
    drawn = pipeline(PROMPTS, image=pictures, negative_prompt=NEGATIVES, **options).images
    return np.round(drawn * 255).astype(np.uint8)


@pytest.mark.parametrize("name", ROWS)
def test_same_picture_as_pytorch(name, tmp_path, monkeypatch, certain):
    channels, scheduler, masked, strength = ROWS[name]
    folder = tiny_folder(tmp_path / "model", unet={"in_channels": channels}, scheduler=scheduler)
    images, masks = given(masked)
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    edits = [
        Edit(image, mask) for image, mask in zip(images, [None] * 2 if masks is None else masks, strict=True)
    ]
    ours = engine.load(folder).generate(
        PROMPTS,
        NEGATIVES,
        steps=STEPS,
        guidance_scale=SCALE,
        latents=noise,
        given=edits,
        strength=strength,
    )
    theirs = in_pytorch(folder, channels, images, masks, strength, noise, monkeypatch)
    if masks is not None:  # we put back what the mask keeps, which an autoencoder changes a little
        theirs = np.where(masks[..., None] == 1, theirs, images)
    assert theirs.std() > 20
    assert psnr(ours, theirs) >= 45
    assert psnr(ours[::-1], theirs) < 25
