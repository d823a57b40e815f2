"""The autoencoder against diffusers': random weights, one config a row."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Original

from engine.models.autoencoder import AutoencoderConfig, AutoencoderKL
from tests.parity.common import Twin, assert_same, compiled, nchw, nhwc, normal


def levels(*widths: int) -> dict:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": 4,
    }


# name: (options, (height, width) of the picture)
CONFIGS = {
    "stable diffusion": (levels(8, 16, 16) | {"layers_per_block": 2}, (8, 12)),
    "no quantization convolutions": (
        levels(8, 12) | {"use_quant_conv": False, "use_post_quant_conv": False},
        (10, 6),
    ),
    "the first alone": (levels(8, 12) | {"use_post_quant_conv": False, "latent_channels": 8}, (6, 6)),
    "the second alone": (levels(8, 12) | {"use_quant_conv": False, "norm_num_groups": 2}, (6, 8)),
    "no attention": (levels(8, 12) | {"mid_block_add_attention": False, "act_fn": "mish"}, (8, 6)),
    "one level, grey pictures": (
        levels(8) | {"in_channels": 1, "out_channels": 1, "latent_channels": 3, "act_fn": "gelu"},
        (5, 7),
    ),
}


def twins(options: dict) -> Twin:
    """Our model is built from what the original writes as its config.json."""
    original = Original(**options)
    config = AutoencoderConfig.from_json(json.loads(original.to_json_string()), "vae/config.json")
    return Twin(lambda rngs: AutoencoderKL(config, rngs), original, "vae")


@pytest.mark.parametrize("name", CONFIGS)
def test_whole(name):
    """Encoding to mean and log variance, and decoding."""
    options, size = CONFIGS[name]
    twin = twins(options)
    picture = normal(2, twin.original.config.in_channels, *size)
    with torch.no_grad():
        posterior = twin.original.encode(torch.from_numpy(picture)).latent_dist
        decoded = twin.original.decode(posterior.mean).sample

    found = twin(nhwc(picture), method="encode")
    assert_same(nchw(found.mean), posterior.mean)
    assert_same(nchw(found.logvar), posterior.logvar)
    assert_same(nchw(twin(nhwc(posterior.mean.numpy()), method="decode")), decoded)


def test_posterior():
    """The log variance is clipped; the sample and the KL divergence are those of the original."""
    twin = twins(levels(8) | {"mid_block_add_attention": False})
    with torch.no_grad():
        twin.original.quant_conv.weight.mul_(100)
    twin.params = twin.converted()
    picture = normal(2, 3, 4, 4)
    with torch.no_grad():
        expected = twin.original.encode(torch.from_numpy(picture)).latent_dist
    assert expected.logvar.min() == -30 and expected.logvar.max() == 20, "the case does not reach the bounds"

    found = twin(nhwc(picture), method="encode")
    assert_same(nchw(found.logvar), expected.logvar)
    assert_same(found.kl(), expected.kl())
    key = jax.random.key(0)
    noise = nchw(jax.random.normal(key, found.mean.shape))
    assert_same(nchw(found.sample(key)), expected.mean + expected.std * torch.from_numpy(noise.copy()))


def test_bfloat16():
    """Weights in bfloat16: float32 goes in and comes out, within a bound of the float32 result.

    Bound: root mean square, relative, 2^-8 of bfloat16 for a dozen operations in a row.
    """
    twin = twins(levels(8))
    picture = normal(2, 4, 4, 3)

    @compiled
    def there_and_back(params, picture):
        return twin.apply(params, twin.apply(params, picture, method="encode").mean, method="decode")

    exact = there_and_back(twin.params, picture)
    found = there_and_back(jax.tree.map(lambda a: a.astype(jnp.bfloat16), twin.params), picture)
    assert found.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact)))
    assert 1e-4 < error < 0.03  # below: nothing was computed in bfloat16
