"""AutoencoderTiny (TAESD) against diffusers': random weights, one config a row; and its mistakes."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as Original
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock as OriginalBlock

from engine.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyBlock, AutoencoderTinyConfig
from engine.types import UserError
from tests.parity.common import Twin, assert_same, nchw, nhwc, normal


def levels(encoder: tuple[int, ...], decoder: tuple[int, ...], width: int = 8) -> dict:
    return {
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
        "encoder_block_out_channels": (width,) * len(encoder),
        "decoder_block_out_channels": (width,) * len(decoder),
    }


# name: (options, (height, width) of the picture)
CONFIGS = {
    "TAESD, narrow": (levels((1, 3, 3, 3), (3, 3, 3, 1)), (16, 24)),
    "two levels, grey pictures, 16 channels": (
        levels((2, 1), (1, 2)) | {"in_channels": 1, "out_channels": 1, "latent_channels": 16},
        (6, 10),
    ),
    "gelu, halves of two widths": (
        levels((1, 2), (2, 1)) | {"act_fn": "gelu", "decoder_block_out_channels": (12, 12)},
        (8, 6),
    ),
    "enlarged four times at once": (levels((1, 1, 1), (1, 1)) | {"upsampling_scaling_factor": 4}, (8, 12)),
}


def config_of(original: Original) -> AutoencoderTinyConfig:
    """From what the original writes as its config.json."""
    return AutoencoderTinyConfig.from_json(json.loads(original.to_json_string()), "vae/config.json")


def twins(options: dict) -> Twin:
    original = Original(**options)
    config = config_of(original)
    return Twin(lambda rngs: AutoencoderTiny(config, rngs), original, "vae")


@pytest.mark.parametrize("name", CONFIGS)
def test_whole(name):
    """Encoding, and decoding of latents so large that the decoder clamps them."""
    options, size = CONFIGS[name]
    twin = twins(options)
    picture = normal(2, twin.original.config.in_channels, *size)
    with torch.no_grad():
        encoded = twin.original.encode(torch.from_numpy(picture)).latents
        latents = 3 * torch.randn(encoded.shape, generator=torch.Generator().manual_seed(0))
        decoded = twin.original.decode(latents).sample

    found = twin(nhwc(picture), method="encode")
    assert_same(nchw(found.mean), encoded)
    assert np.exp(0.5 * found.logvar).max() < 1e-6
    assert_same(nchw(twin(nhwc(latents.numpy()), method="decode")), decoded)


@pytest.mark.parametrize("act", ["relu", "silu", "mish", "gelu"])
def test_block(act):
    twin = Twin(lambda rngs: AutoencoderTinyBlock(6, act, rngs), OriginalBlock(6, 6, act))
    x = normal(2, 6, 5, 4)
    assert_same(nchw(twin(nhwc(x))), twin.theirs(x))


def test_defaults_are_the_originals():
    assert config_of(Original()) == AutoencoderTinyConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_block_out_channels": [64, 64, 64, 32]}, "write one number throughout"),
        (
            {"num_decoder_blocks": [3, 3, 1]},
            "num_decoder_blocks has 3 entries for 4 decoder_block_out_channels",
        ),
        ({"upsampling_scaling_factor": 3}, "enlarges them 27 times"),
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear' is not supported; supported: 'nearest'"),
        ({"shift_factor": 0.1}, "shift_factor=0.1 is not supported"),
        ({"act_fn": "tanh"}, "unknown activation 'tanh'"),
        ({"num_encoder_blocks": [0, 3, 3, 3]}, "num_encoder_blocks=.*: write whole numbers from 1"),
        ({"latent_chanels": 4}, r"unknown option 'latent_chanels' \(did you mean latent_channels\?\)"),
    ],
    ids=str,
)
def test_values_that_no_model_has_are_refused(options, message):
    with pytest.raises(UserError, match=f"^vae/config.json: .*{message}"):
        AutoencoderTinyConfig.from_json(options, "vae/config.json")
