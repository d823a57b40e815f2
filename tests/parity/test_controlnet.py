"""ControlNets against diffusers': alone, two at once, and with the U-Net that they add to."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from engine.controls import said
from engine.models.controlnet import Control, ControlNetConfig, ControlNetModel
from engine.models.unet import UNet2DConditionModel
from tests.parity.common import Twin, assert_same, compiled, nchw, nhwc, normal
from tests.parity.test_unet import ATTENDS, BASE, FOUR_LEVELS, L, T
from tests.parity.test_unet import twins as unet_twins

SHARED = {k: v for k, v in BASE.items() if k != "up_block_types"}
HALVING = {"conditioning_embedding_out_channels": (4, 8)}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 5 + 6 * 8,
}

# name: (options, (height, width) of the latent)
CONFIGS = {
    "stable diffusion 1": (FOUR_LEVELS | {"attention_head_dim": 8}, (16, 8)),
    "stable diffusion 2": (
        FOUR_LEVELS | {"attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True},
        (12, 10),
    ),
    "xl": (ATTENDS | ADDED | {"transformer_layers_per_block": (1, 2)} | HALVING, (6, 4)),
    "blue before red, no words in the middle": (
        {"controlnet_conditioning_channel_order": "bgr", "mid_block_type": "UNetMidBlock2D"} | HALVING,
        (7, 9),
    ),
    "one level": (
        {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",)} | HALVING,
        (5, 3),
    ),
    "sines first, autoencoder's padding": (
        {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "act_fn": "gelu"} | HALVING,
        (13, 6),
    ),
}


def twins(options: dict) -> Twin:
    """Our model is built from what the original writes as its config.json."""
    options = {k: v for k, v in (SHARED | options).items() if k != "up_block_types"}
    original = diffusers.ControlNetModel(**options)
    config = ControlNetConfig.from_json(json.loads(original.to_json_string()), "config.json")
    return Twin(lambda rngs: ControlNetModel(config, rngs), original, "controlnet")


def picture(twin: Twin, size: tuple[int, int], seed: int = 2) -> np.ndarray:
    """NCHW, 0 to 1."""
    scale = 2 ** (len(twin.original.config.conditioning_embedding_out_channels) - 1)
    return np.random.default_rng(seed).random((2, 3, scale * size[0], scale * size[1]), np.float32)


def beside(twin: Twin) -> tuple[np.ndarray, np.ndarray] | None:
    if twin.original.config.addition_embed_type is None:
        return None
    return normal(2, 5, seed=3), np.array([[512, 640, 0, 8, 512, 640]] * 2, np.float32)


def theirs(twin: Twin, x, context, shown, scale):
    added = beside(twin)
    options = {}
    if added:
        options["added_cond_kwargs"] = dict(
            zip(("text_embeds", "time_ids"), map(torch.from_numpy, added), strict=True)
        )
    tensors = map(torch.from_numpy, (x, T, context, shown))
    return twin.theirs(*tensors, conditioning_scale=scale, **options)


def ours(twin: Twin, scale):
    """(params, x, context, picture) -> Control, with the words read beforehand."""

    def call(params, x, context, shown):
        model = nnx.merge(twin.graphdef, nnx.State(params))
        added, read = jax.tree.map(jnp.asarray, beside(twin)), model.read(context)
        full_size, state = model.near(x, jnp.asarray(T), read, model.look(shown), scale, added)
        return Control(full_size, lambda: model.deep(state, read, scale))

    return call


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_added(name):
    options, size = CONFIGS[name]
    twin = twins(options)
    x, context, shown = normal(2, 4, *size), normal(2, L, 12, seed=1), picture(twin, size)
    expected = theirs(twin, x, context, shown, 0.7)

    def everything(*args):
        control = ours(twin, 0.7)(*args)
        return control.full_size, control.deep()

    near, (far, middle) = compiled(everything)(twin.params, nhwc(x), context, nhwc(shown))
    down = expected.down_block_res_samples
    assert len(down) == len(near) + len(far)
    for mine, other in zip([*near, *far, middle], [*down, expected.mid_block_res_sample], strict=True):
        assert_same(nchw(mine), other)


def test_each_picture_may_have_its_own_scale():
    options, size = CONFIGS["one level"]
    twin = twins(options)
    x, context, shown = normal(2, 4, *size), normal(2, L, 12, seed=1), picture(twin, size)

    def middle(scale):
        call = compiled(lambda *args: ours(twin, scale)(*args).deep()[1])
        return call(twin.params, nhwc(x), context, nhwc(shown))

    both = middle(jnp.array([0.25, 2.0]))
    np.testing.assert_allclose(both[0], middle(0.25)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both[1], middle(2.0)[1], rtol=1e-5, atol=1e-6)
    assert np.abs(both).max() > 0.1


@pytest.mark.parametrize("count", [1, 2])
def test_the_unet_that_they_add_to(count):
    """Every skip and the middle get what is theirs: a sum over two ControlNets with scales of their own."""
    size, scales = (6, 10), (0.7, 1.5)[:count]
    unet, nets = unet_twins({"layers_per_block": 2}), []
    for seed in range(count):
        nets.append(twins({"layers_per_block": 2} | HALVING))
        with torch.no_grad():
            for parameter in nets[-1].original.parameters():
                parameter.mul_(1 - 0.1 * seed)
        nets[-1].params = nets[-1].converted()
    x, context = normal(2, 4, *size), normal(2, L, 12, seed=1)
    shown = [picture(net, size, seed) for seed, net in enumerate(nets)]
    found = [theirs(net, x, context, s, scale) for net, s, scale in zip(nets, shown, scales, strict=True)]
    down = [sum(each) for each in zip(*(f.down_block_res_samples for f in found), strict=True)]
    expected = unet.theirs(
        *map(torch.from_numpy, (x, T, context)),
        down_block_additional_residuals=down,
        mid_block_additional_residual=sum(f.mid_block_res_sample for f in found),
    ).sample

    def whole(params, params_of_nets, x, context, shown):
        models = [
            nnx.merge(net.graphdef, nnx.State(own)) for net, own in zip(nets, params_of_nets, strict=True)
        ]
        seen = [model.look(each) for model, each in zip(models, shown, strict=True)]
        t, reads = jnp.asarray(T), [context] * count
        control = said(lambda: models, x, t, reads, seen, jnp.asarray(scales), None)
        model = nnx.merge(unet.graphdef, nnx.State(params))
        assert isinstance(model, UNet2DConditionModel)
        return model(x, t, context, control=control)

    arguments = unet.params, [net.params for net in nets], nhwc(x), context, list(map(nhwc, shown))
    assert_same(nchw(compiled(whole)(*arguments)), expected)
    plain = unet(nhwc(x), T, context)
    assert np.abs(nchw(plain) - expected.numpy()).max() > 0.1  # that they add something is seen


def test_a_new_one_adds_nothing():
    """Zhang et al. 2023, section 3.2: zero convolutions, so that the U-Net begins as it was."""
    options, size = CONFIGS["xl"]
    twin = twins(options)
    config = ControlNetConfig.from_json(json.loads(twin.original.to_json_string()), "config.json")
    fresh = nnx.split(ControlNetModel(config, nnx.Rngs(0)), nnx.Param)[1]
    arguments = nhwc(normal(2, 4, *size)), normal(2, L, 12, seed=1), nhwc(picture(twin, size))

    def everything(*args):
        control = ours(twin, 1.0)(*args)
        return control.full_size, control.deep()

    added = compiled(everything)(nnx.to_pure_dict(fresh), *map(jnp.asarray, arguments))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(added))


def test_gradients_through_the_unet_that_stays():
    """Of a squared error of the whole, with respect to all of the ControlNet: what its training needs."""
    size = (6, 4)
    unet, net = unet_twins({}), twins(HALVING)
    x, context, shown = normal(2, 4, *size), normal(2, L, 12, seed=1), picture(net, size)
    wanted = normal(2, 4, *size, seed=4)

    def loss(params):
        control = ours(net, 1.0)(params, *map(jnp.asarray, (nhwc(x), context, nhwc(shown))))
        model = nnx.merge(unet.graphdef, nnx.State(unet.params))
        found = model(jnp.asarray(nhwc(x)), jnp.asarray(T), jnp.asarray(context), control=control)
        return jnp.square(found - nhwc(wanted)).mean()

    gradient = compiled(jax.grad(loss))(net.params)
    tensors = [torch.from_numpy(each) for each in (x, T, context)]
    control = net.original(*tensors, torch.from_numpy(shown))
    found = unet.original(
        *tensors,
        down_block_additional_residuals=control.down_block_res_samples,
        mid_block_additional_residual=control.mid_block_res_sample,
    ).sample
    torch.square(found - torch.from_numpy(wanted)).mean().backward()
    with torch.no_grad():
        for parameter in net.original.parameters():  # the gradients, laid out as the parameters were
            parameter.copy_(parameter.grad)
    jax.tree.map_with_path(
        lambda path, a, b: assert_same(a, b, 1e-4, where=str(path)), gradient, net.converted()
    )
