"""The whole U-Net against diffusers': every option, random weights, one config a row."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers import UNet2DConditionModel as Original
from flax import nnx

from engine.models.unet import UNet2DConditionModel, UNetConfig
from tests.parity.common import Twin, assert_same, compiled, nchw, nhwc, normal

L = 7  # words
T = np.array([3.25, 871.0], np.float32)  # another time for each image, and not a whole number

BASE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
}
ATTENDS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
FOUR_LEVELS = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "norm_num_groups": 32,
}

# name: (options, (height, width) of the latent)
CONFIGS = {
    "stable diffusion 1": (FOUR_LEVELS | {"attention_head_dim": 8}, (16, 8)),
    "stable diffusion 2": (
        FOUR_LEVELS
        | {"attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True, "upcast_attention": True},
        (12, 10),  # no multiples of 8
    ),
    "sines first, centred input, wide epsilon": (
        {"flip_sin_to_cos": False, "freq_shift": 1, "center_input_sample": True, "norm_eps": 0.1},
        (6, 4),
    ),
    "time scales and shifts, mish": ({"resnet_time_scale_shift": "scale_shift", "act_fn": "mish"}, (6, 4)),
    "context alone": (ATTENDS | {"only_cross_attention": True, "act_fn": "gelu"}, (4, 4)),
    "context alone in one block": (
        ATTENDS | {"only_cross_attention": (False, True), "norm_num_groups": 16},
        (4, 4),
    ),
    "options as lists": (
        {
            "layers_per_block": (2, 1),
            "attention_head_dim": (2, 8),
            "cross_attention_dim": (12, 12),
            "transformer_layers_per_block": (2, 1),
        },
        (4, 4),
    ),
    "two widths of context": (
        {"cross_attention_dim": (12, 20), "mid_block_type": "UNetMidBlock2D", "act_fn": "relu"},
        (4, 4),
    ),
    "deep": ({"layers_per_block": 2, "transformer_layers_per_block": 2}, (4, 4)),
    "another depth behind each residual block, as SSD-1B": (
        ATTENDS
        | {
            "transformer_layers_per_block": (1, (2, 3)),
            "reverse_transformer_layers_per_block": ((3, 1, 2), 1),
            "layers_per_block": (1, 2),
            "mid_block_type": "UNetMidBlock2D",
        },
        (4, 4),
    ),
    "no mid block, odd sizes": ({"mid_block_type": None}, (7, 9)),
    "autoencoder's padding, odd sizes": ({"downsample_padding": 0, "mid_block_scale_factor": 2.0}, (13, 6)),
    "no attention, more channels in than out": (
        PLAIN | {"mid_block_type": "UNetMidBlock2D", "in_channels": 9, "out_channels": 3},
        (5, 4),
    ),
    "one level": (
        {
            "block_out_channels": (16,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "act_fn": "swish",
        },
        (5, 3),
    ),
    "three levels, odd sizes": (
        {
            "block_out_channels": (8, 16, 24),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        (11, 6),
    ),
}


def twins(options: dict) -> Twin:
    """Our model is built from what the original writes as its config.json."""
    original = Original(**BASE | options)
    config = UNetConfig.from_json(json.loads(original.to_json_string()), "unet/config.json")
    return Twin(lambda rngs: UNet2DConditionModel(config, rngs), original, "unet")


def inputs(twin: Twin, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A latent (NCHW) and a context."""
    config = twin.original.config
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    return normal(2, config.in_channels, *size), normal(2, L, width, seed=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole(name):
    options, size = CONFIGS[name]
    twin = twins(options)
    x, context = inputs(twin, size)
    theirs = twin.theirs(x, torch.from_numpy(T), torch.from_numpy(context)).sample
    assert_same(nchw(twin(nhwc(x), T, context)), theirs)


@pytest.mark.parametrize("name", ["stable diffusion 2", "context alone in one block"])
def test_words_that_were_read_beforehand(name):
    options, size = CONFIGS[name]
    twin = twins(options)
    x, context = inputs(twin, size)
    theirs = twin.theirs(x, torch.from_numpy(T), torch.from_numpy(context)).sample

    def unet(params):
        return nnx.merge(twin.graphdef, nnx.State(params))

    read = compiled(lambda params: unet(params).read(jnp.asarray(context)))(twin.params)
    ours = compiled(lambda params, x, read: unet(params)(x, jnp.asarray(T), read))(twin.params, nhwc(x), read)
    assert_same(nchw(ours), theirs)


def test_pooled_words_and_sizes_beside_the_time():
    """SDXL's: no attention at the first level, several layers of it at the others."""
    options = {
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "upcast_attention": None,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 5 + 6 * 6,
    }
    twin, pooled = twins(options), normal(2, 5, seed=2)
    sizes = np.array([[1024, 768, 0, 0, 1024, 768], [512, 512, 64, 0, 256, 1024]], np.float32)
    x, context = inputs(twin, (8, 4))
    beside = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(sizes)}
    theirs = twin.theirs(x, torch.from_numpy(T), torch.from_numpy(context), added_cond_kwargs=beside).sample
    assert_same(nchw(twin(nhwc(x), T, context, None, (pooled, sizes))), theirs)


def test_guidance_in_its_time():
    twin, w = twins({"time_cond_proj_dim": 9}), np.array([7.5, 0.0], np.float32)
    x, context = inputs(twin, (4, 4))
    embedded = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.from_numpy(w), 9)
    theirs = twin.theirs(
        x, torch.from_numpy(T), torch.from_numpy(context), timestep_cond=embedded.float()
    ).sample
    assert_same(nchw(twin(nhwc(x), T, context, w)), theirs)


def test_bfloat16():
    """All in bfloat16: the dtype is kept, and the result is about as near to float32 as PyTorch's is.

    The bounds are on the root mean square, relative: 3 %, which is 2^-8 of bfloat16 for a few dozen
    operations in a row that add up like a random walk, and 1.5 times PyTorch's error, which rounds once
    where a bias is added and we round twice.
    """
    twin = twins(PLAIN | {"upcast_attention": True})
    x, context = inputs(twin, (8, 8))
    exact = twin.theirs(x, torch.from_numpy(T), torch.from_numpy(context)).sample.numpy()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), twin.params)
    ours = compiled(twin.apply)(half, nhwc(x), T, context)
    assert ours.dtype == jnp.bfloat16

    twin.original.bfloat16()
    as_half = [torch.from_numpy(a).bfloat16() for a in (x, context)]
    theirs = twin.theirs(as_half[0], torch.from_numpy(T), as_half[1]).sample.float().numpy()

    def error(found):
        return np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact)))

    assert error(nchw(ours.astype(jnp.float32))) < min(0.03, 1.5 * error(theirs))


def test_gradients():
    """The gradient of a training loss by every parameter, by the latent and by the context."""
    twin = twins(PLAIN | {"resnet_time_scale_shift": "scale_shift"})
    x, context = inputs(twin, (6, 5))
    target = normal(2, 4, 6, 5, seed=2)

    @compiled
    def ours(params, x, context):
        def loss(params, x, context):
            return jnp.mean(jnp.square(twin.apply(params, x, jnp.asarray(T), context) - nhwc(target)))

        return jax.grad(loss, argnums=(0, 1, 2))(params, x, context)

    by_params, by_x, by_context = ours(twin.params, nhwc(x), context)
    x, context = (torch.from_numpy(a).requires_grad_() for a in (x, context))
    out = twin.original(x, torch.from_numpy(T), context).sample
    torch.nn.functional.mse_loss(out, torch.from_numpy(target)).backward()

    assert_same(nchw(by_x), x.grad, tolerance=1e-3)
    assert_same(by_context, context.grad, tolerance=1e-3)
    for parameter in twin.original.parameters():  # the gradients, laid out as the parameters were
        parameter.data = parameter.grad
    theirs = twin.converted()
    jax.tree.map_with_path(lambda path, a, b: assert_same(a, b, 1e-3, where=str(path)), by_params, theirs)
