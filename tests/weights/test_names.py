"""Paths <-> checkpoint keys, and the order of axes."""

import numpy as np
import pytest

from engine.weights import names


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (
            ("down_blocks", 0, "resnets", 1, "conv1", "kernel"),
            "down_blocks.0.resnets.1.conv1.weight",
        ),
        (("conv_norm_out", "scale"), "conv_norm_out.weight"),
        (("conv_norm_out", "bias"), "conv_norm_out.bias"),
        (("embeddings", "token_embedding", "embedding"), "embeddings.token_embedding.weight"),
        (("attn1", "to_out", 0, "kernel"), "attn1.to_out.0.weight"),
    ],
)
def test_the_path_is_the_key(path, key):
    assert names.to_key(path) == key
    assert names.keys([path]) == {key: path}


def test_layouts_are_those_of_pytorch():
    """A Linear and a Conv2d of PyTorch, computed in both layouts, give the same numbers."""
    import jax
    import torch

    linear = torch.nn.Linear(3, 5, bias=False)
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    kernel = names.to_flax(("kernel",), linear.weight.detach().numpy(), 2)
    np.testing.assert_allclose(x @ kernel, linear(torch.tensor(x)).detach().numpy(), atol=1e-6)

    conv = torch.nn.Conv2d(3, 5, (2, 4), bias=False)
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 7)).astype(np.float32)
    kernel = names.to_flax(("kernel",), conv.weight.detach().numpy(), 4)
    assert kernel.shape == (2, 4, 3, 5)
    ours = jax.lax.conv_general_dilated(
        x.transpose(0, 2, 3, 1), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        ours.transpose(0, 3, 1, 2), conv(torch.tensor(x)).detach().numpy(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("leaf", "shape"),
    [("kernel", (3, 5)), ("kernel", (2, 4, 3, 5)), ("embedding", (3, 5)), ("scale", (7,)), ("bias", (7,))],
)
def test_layout_there_and_back(leaf, shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    there = names.to_torch((leaf,), array)
    assert there.shape == names.torch_shape((leaf,), shape)
    np.testing.assert_array_equal(names.to_flax((leaf,), there, len(shape)), array)
    assert np.shares_memory(there, array)


@pytest.mark.parametrize(
    ("kind", "key", "canonical"),
    [
        ("vae", "encoder.mid_block.attentions.0.query.weight", "encoder.mid_block.attentions.0.to_q.weight"),
        ("vae", "decoder.mid_block.attentions.0.key.bias", "decoder.mid_block.attentions.0.to_k.bias"),
        ("vae", "decoder.mid_block.attentions.0.value.bias", "decoder.mid_block.attentions.0.to_v.bias"),
        (
            "vae",
            "decoder.mid_block.attentions.0.proj_attn.weight",
            "decoder.mid_block.attentions.0.to_out.0.weight",
        ),
        ("text_encoder", "text_model.embeddings.position_ids", None),
        ("text_encoder", "embeddings.position_ids", None),
        ("text_encoder", "final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("text_encoder", "text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        # an alias holds for its own component and place alone
        ("unet", "mid_block.attentions.0.query.weight", "mid_block.attentions.0.query.weight"),
        ("vae", "encoder.conv_in.weight", "encoder.conv_in.weight"),
        ("unet", "embeddings.position_ids", "embeddings.position_ids"),
    ],
)
def test_old_and_new_names(kind, key, canonical):
    assert names.canonical(kind, key) == canonical


def test_only_the_old_autoencoders_attention_may_be_a_convolution():
    key = "encoder.mid_block.attentions.0.to_q.weight"
    assert names.fits("vae", key, (4, 4, 1, 1), (4, 4))
    assert names.fits("vae", key, (4, 4), (4, 4))
    assert not names.fits("vae", key, (4, 4, 3, 3), (4, 4))
    assert not names.fits("vae", "encoder.conv_in.weight", (4, 4, 1, 1), (4, 4))
    assert not names.fits("unet", "mid_block.attentions.0.proj_in.weight", (4, 4, 1, 1), (4, 4))
