"""Single files of SDXL, held against the converters of PyTorch diffusers, which read the same layout."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file as load_torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import engine
from engine.weights import single_file_written
from engine.weights.original_names import REFINER_OPEN_CLIP, XL_OPEN_CLIP
from tests.parity.common import nchw
from tests.parity.pictures import psnr
from tests.parity.test_single_file import ORIGINAL_VAE, assert_equal, config, stored
from tests.single import foreign, like_xl

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPT = "a red fox at night"
# What the original program's config (sd_xl_base.yaml) would say of the tiny model.
ORIGINAL = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "transformer_depth": 2,
    "context_dim": 2048,  # by which theirs knows it
    "num_classes": "sequential",
    "adm_in_channels": 32 + 6 * 256,
    "image_size": 128,
}


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    at = tmp_path_factory.mktemp("xl")
    for name in ("base", "refiner"):
        foreign(like_xl(at / name, refines=name == "refiner"), at / f"{name}.safetensors")
    return at


@pytest.mark.parametrize(("name", "prefix"), [("base", XL_OPEN_CLIP), ("refiner", REFINER_OPEN_CLIP)])
def test_diffusers_reads_the_same_weights(at, name, prefix):
    checkpoint = load_torch(at / f"{name}.safetensors")
    unet = theirs.convert_ldm_unet_checkpoint(checkpoint, config(at / name, "unet"))
    assert_equal(unet, stored(at / name, "unet"))
    vae = theirs.convert_ldm_vae_checkpoint(checkpoint, config(at / name, "vae"))
    assert_equal(vae, stored(at / name, "vae"))
    options = {k: v for k, v in config(at / name, "text_encoder_2").items() if k != "architectures"}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**options))
    read = theirs.convert_open_clip_checkpoint(second, checkpoint, prefix)
    assert_equal(read, stored(at / name, "text_encoder_2"))
    if name == "base":
        first = theirs.convert_ldm_clip_checkpoint(checkpoint)
        assert_equal(first, stored(at / name, "text_encoder"))


def test_the_config_is_that_which_diffusers_makes_of_the_original_one(at):
    params = {
        "unet_config": {"params": ORIGINAL},
        "first_stage_config": {"params": {"ddconfig": ORIGINAL_VAE}},
    }
    original = {"model": {"params": params}}
    made = theirs.create_unet_diffusers_config_from_ldm(original, load_torch(at / "base.safetensors"))
    ours, compared = config(at / "base", "unet"), 0
    for name, value in made.items():
        # the size of pictures theirs tells by keys that only full files have
        if name in ours and name not in ("sample_size", "cross_attention_dim"):
            assert ours[name] == (list(value) if isinstance(value, tuple) else value), name
            compared += 1
    assert compared > 10


def test_diffusers_draws_the_same_picture_from_the_single_file(at, tmp_path):
    single_file_written.to_file(at / "base", tmp_path / "base.safetensors")
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    options = {"guidance_scale": 3.0, "height": 16, "width": 16}
    ours = engine.load(at / "base").generate([PROMPT], steps=4, latents=latents, seed=0, **options)
    pipeline = StableDiffusionXLPipeline.from_single_file(
        tmp_path / "base.safetensors", config=str(at / "base"), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    start = torch.from_numpy(nchw(latents).copy())
    drawn = pipeline([PROMPT], latents=start, num_inference_steps=4, output_type="np", **options).images
    assert ours.std() > 20
    assert psnr(ours, np.round(drawn * 255)) >= 45
