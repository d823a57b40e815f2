"""The parts of the models against PyTorch's and diffusers' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from engine.models import attention, clip, layers
from tests.parity.common import Twin, assert_same, compiled, nchw, nhwc, normal

CHANNELS = 16


def assert_same_picture(twin: Twin, x: np.ndarray, *ours, **theirs):
    """`x` is NCHW; `ours` are the further arrays of our call, `theirs` those of the original's."""
    assert_same(nchw(twin(nhwc(x), *ours)), twin.theirs(x, **theirs))


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations(name):
    original = {"silu": nn.SiLU(), "swish": nn.SiLU(), "mish": nn.Mish()}.get(name) or ACT2FN[name]
    x = np.linspace(-30, 30, 1001, dtype=np.float32)
    assert_same(layers.ACTIVATIONS[name](jnp.asarray(x)), original(torch.from_numpy(x)))


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1e3, 1.0), (1e3, 1e-1), (0.0, 1e-3)])
@pytest.mark.parametrize("shape", [(7, 5), (12,)], ids=["picture", "tokens"])
def test_group_norm(mean, spread, shape):
    """Also where the mean is 10,000 times the spread: E[x^2] - E[x]^2 would lose every digit of it there."""
    twin = Twin(
        lambda rngs: layers.GroupNorm(4, CHANNELS, epsilon=1e-6, rngs=rngs), nn.GroupNorm(4, CHANNELS, 1e-6)
    )
    x = (mean + spread * normal(2, CHANNELS, *shape)).astype(np.float32)
    ours = np.moveaxis(np.asarray(twin(np.moveaxis(x, 1, -1))), -1, 1)
    # Float32 holds x itself to 2^-24 of its mean, and so the result to mean / spread of that.
    assert_same(ours, _group_norm_float64(twin.original, x), tolerance=1e-6 + 2.0**-22 * mean / spread)


def _group_norm_float64(norm: nn.GroupNorm, x: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return nn.functional.group_norm(
            torch.from_numpy(x).double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
        ).float()


@pytest.mark.parametrize("out_channels", [CHANNELS, 24])
@pytest.mark.parametrize("shift", ["default", "scale_shift"])
def test_resnet_block(out_channels, shift):
    options = {"temb_channels": 12, "groups": 4, "output_scale_factor": 2.0}
    twin = Twin(
        lambda rngs: layers.ResnetBlock2D(
            CHANNELS,
            out_channels,
            epsilon=0.1,
            act=jax.nn.mish,
            time_scale_shift=shift,
            rngs=rngs,
            **options,
        ),
        ResnetBlock2D(
            in_channels=CHANNELS,
            out_channels=out_channels,
            eps=0.1,
            non_linearity="mish",
            time_embedding_norm=shift,
            **options,
        ),
    )
    temb = normal(2, 12, seed=1)
    assert_same_picture(twin, normal(2, CHANNELS, 6, 5), temb, temb=torch.from_numpy(temb))


def test_resnet_block_without_time():
    twin = Twin(
        lambda rngs: layers.ResnetBlock2D(
            CHANNELS, 8, temb_channels=None, groups=4, epsilon=1e-6, act=jax.nn.silu, rngs=rngs
        ),
        ResnetBlock2D(in_channels=CHANNELS, out_channels=8, temb_channels=None, groups=4, eps=1e-6),
    )
    assert_same_picture(twin, normal(2, CHANNELS, 6, 5), temb=None)


@pytest.mark.parametrize("size", [(6, 8), (7, 5)], ids=["even", "odd"])
@pytest.mark.parametrize("padding", [0, 1])
def test_downsample(padding, size):
    twin = Twin(
        lambda rngs: layers.Downsample2D(CHANNELS, padding=padding, rngs=rngs),
        Downsample2D(CHANNELS, use_conv=True, padding=padding, name="op"),
    )
    assert_same_picture(twin, normal(2, CHANNELS, *size))


@pytest.mark.parametrize("size", [None, (6, 10), (5, 9), (7, 11), (3, 4)], ids=str)
def test_upsample(size):
    twin = Twin(
        lambda rngs: layers.Upsample2D(CHANNELS, rngs=rngs), Upsample2D(CHANNELS, use_conv=True, name="conv")
    )
    x = normal(2, CHANNELS, 3, 5)
    ours = compiled(lambda params, x: twin.apply(params, x, size))(twin.params, nhwc(x))
    assert_same(nchw(ours), twin.theirs(x, output_size=size))


@pytest.mark.parametrize("dim", [16, 15])
@pytest.mark.parametrize("freq_shift", [0, 1, 0.5])
@pytest.mark.parametrize("flip", [False, True])
def test_sinusoidal_embedding(dim, flip, freq_shift):
    """The tolerance is absolute: at t = 999 float32 holds an angle to 6e-5 only, in PyTorch as here."""
    t = np.array([0.0, 0.25, 1.0, 500.5, 999.0], np.float32)
    ours = layers.sinusoidal_embedding(jnp.asarray(t), dim, flip_sin_to_cos=flip, freq_shift=freq_shift)
    theirs = Timesteps(dim, flip_sin_to_cos=flip, downscale_freq_shift=freq_shift)(torch.from_numpy(t))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_timestep_embedding():
    twin = Twin(
        lambda rngs: layers.TimestepEmbedding(6, 20, jax.nn.mish, rngs=rngs),
        TimestepEmbedding(6, 20, act_fn="mish"),
    )
    x = normal(3, 6)
    assert_same(twin(x), twin.theirs(x))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("context_dim", [None, 12], ids=["self", "cross"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention(heads, context_dim, bias):
    twin = Twin(
        lambda rngs: attention.Attention(
            CHANNELS, heads=heads, context_dim=context_dim, qkv_bias=bias, rngs=rngs
        ),
        Attention(
            CHANNELS,
            cross_attention_dim=context_dim,
            heads=heads,
            dim_head=CHANNELS // heads,
            bias=bias,
        ),
    )
    x = 3 * normal(2, 9, CHANNELS)
    context = () if context_dim is None else (normal(2, 5, context_dim, seed=1),)
    assert_same(twin(x, *context), twin.theirs(x, *context))


def test_attention_among_pixels():
    """The autoencoder's: norm, one head, biases, residual."""
    twin = Twin(
        lambda rngs: attention.SpatialAttention(CHANNELS, groups=4, epsilon=1e-6, rngs=rngs),
        Attention(
            CHANNELS,
            heads=1,
            dim_head=CHANNELS,
            eps=1e-6,
            norm_num_groups=4,
            residual_connection=True,
            bias=True,
            upcast_softmax=True,
            _from_deprecated_attn_block=True,
        ),
    )
    assert_same_picture(twin, normal(2, CHANNELS, 5, 4))


@pytest.mark.parametrize("only_cross_attention", [False, True])
def test_transformer_block(only_cross_attention):
    twin = Twin(
        lambda rngs: attention.BasicTransformerBlock(
            CHANNELS,
            heads=2,
            context_dim=12,
            only_cross_attention=only_cross_attention,
            rngs=rngs,
        ),
        BasicTransformerBlock(
            CHANNELS, 2, CHANNELS // 2, cross_attention_dim=12, only_cross_attention=only_cross_attention
        ),
    )
    x, context = normal(2, 9, CHANNELS), normal(2, 5, 12, seed=1)
    theirs = twin.theirs(x, encoder_hidden_states=torch.from_numpy(context))
    assert_same(twin(x, context), theirs)


@pytest.mark.parametrize("use_linear_projection", [False, True], ids=["conv", "linear"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_transformer(use_linear_projection, blocks):
    twin = Twin(
        lambda rngs: attention.Transformer2DModel(
            CHANNELS,
            heads=2,
            layers=blocks,
            context_dim=12,
            groups=4,
            use_linear_projection=use_linear_projection,
            only_cross_attention=False,
            rngs=rngs,
        ),
        Transformer2DModel(
            2,
            CHANNELS // 2,
            in_channels=CHANNELS,
            num_layers=blocks,
            norm_num_groups=4,
            cross_attention_dim=12,
            use_linear_projection=use_linear_projection,
        ),
    )
    x, context = normal(2, CHANNELS, 3, 4), normal(2, 5, 12, seed=1)
    theirs = twin.theirs(x, encoder_hidden_states=torch.from_numpy(context)).sample
    assert_same(nchw(twin(nhwc(x), context)), theirs)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_layer(act):
    options = {"hidden_size": CHANNELS, "intermediate_size": 24, "num_attention_heads": 4, "hidden_act": act}
    theirs = CLIPTextConfig(layer_norm_eps=0.1, **options)
    theirs._attn_implementation = "eager"
    ours = clip.CLIPTextConfig(layer_norm_eps=0.1, **options)
    twin = Twin(lambda rngs: clip.CLIPEncoderLayer(ours, rngs), CLIPEncoderLayer(theirs))
    x = normal(2, 7, CHANNELS)
    causal = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    assert_same(twin(x), twin.theirs(x, causal))
