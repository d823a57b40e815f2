"""T2I-Adapters against diffusers': alone, two at once, and with the U-Net and the ControlNet beside them."""

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from engine.controls import said
from engine.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from engine.models.unet import UNet2DConditionModel
from tests.parity import test_controlnet
from tests.parity.common import Twin, assert_same, compiled, nchw, nhwc, normal
from tests.parity.test_unet import FOUR_LEVELS, L, T
from tests.parity.test_unet import twins as unet_twins

FULL = {"channels": (32, 32, 64, 64), "downscale_factor": 2}
LIGHT = {
    "channels": (32, 32, 64),
    "num_res_blocks": 3,
    "downscale_factor": 2,
    "adapter_type": "light_adapter",
}
XL = {"channels": (16, 32, 32, 32), "downscale_factor": 4, "adapter_type": "full_adapter_xl"}

# name: (options, (height, width) of the picture)
CONFIGS = {
    "full": (FULL, (32, 16)),
    "full, sides that are odd on the way": (FULL, (26, 38)),
    "full, of greys": (FULL | {"in_channels": 1, "num_res_blocks": 1}, (16, 16)),
    "light": (LIGHT, (32, 16)),
    "light, of greys, sides that are odd": (LIGHT | {"in_channels": 1}, (18, 22)),
    "xl": (XL, (32, 48)),
    "xl, of greys, sides that are odd": (XL | {"in_channels": 1}, (20, 28)),
}
# The U-Net of SDXL: its first level has no attention; and what its adapter adds comes last in the middle.
XL_UNET = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


def twins(options: dict) -> Twin:
    """Our model is built from what the original writes as its config.json."""
    original = diffusers.T2IAdapter(**options)
    config = T2IAdapterConfig.from_json(json.loads(original.to_json_string()), "config.json")
    twin = Twin(lambda rngs: T2IAdapter(config, rngs), original, "controlnet")
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(2)  # relu halves
    twin.params = twin.converted()
    return twin


def picture(size: tuple[int, int], seed: int = 2) -> np.ndarray:
    """Pixels, NHWC."""
    return np.random.default_rng(seed).integers(0, 256, (2, *size, 3), dtype=np.uint8)


def theirs(twin: Twin, shown: np.ndarray) -> list[torch.Tensor]:
    """Greys are those of Pillow, as where diffusers' pipelines are given pictures."""
    if twin.original.config.in_channels == 1:
        shown = np.stack([np.asarray(Image.fromarray(each).convert("L"))[..., None] for each in shown])
    return twin.theirs(torch.from_numpy(nchw(shown).astype(np.float32) / 255))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_seen(name):
    options, size = CONFIGS[name]
    twin, shown = twins(options), picture(size)
    found = twin(shown / np.float32(255), method="look")
    expected = theirs(twin, shown)
    config = T2IAdapterConfig(**options)
    assert len(found) == len(expected) == len(config.features)
    for mine, other, (channels, cell) in zip(found, expected, config.features, strict=True):
        assert_same(nchw(mine), other)
        assert mine.shape == (2, -(-size[0] // cell), -(-size[1] // cell), channels)


@pytest.mark.parametrize(
    "unet, adapters, size, controlled",
    [
        (FOUR_LEVELS, [(FULL, 0.7)], (26, 40), False),
        (FOUR_LEVELS, [(FULL, 0.7), (LIGHT, 1.5)], (16, 32), False),
        (FOUR_LEVELS, [(FULL | {"channels": (32, 32)}, 1.2), (FULL, 0.5)], (16, 16), False),
        (XL_UNET, [(XL, 0.8)], (32, 24), False),
        (XL_UNET, [(XL, 0.8)], (16, 16), True),
    ],
    ids=[
        "full",
        "full and light",
        "not to all levels",
        "xl",
        "xl beside a ControlNet",
    ],
)
def test_the_unet_that_they_add_to(unet, adapters, size, controlled):
    model, nets = unet_twins(unet), [twins(own) for own, _ in adapters]
    scales = [scale for _, scale in adapters]
    latent = size[0] // 2, size[1] // 2
    x, context = normal(2, 4, *latent), normal(2, L, 12, seed=1)
    shown = [picture(size, seed) for seed in range(len(nets))]
    options = {}
    if controlled:
        nets.append(test_controlnet.twins(unet | test_controlnet.HALVING))
        scales.append(0.6)
        shown.append(picture(size, 9))
        hint = nchw(shown[-1]).astype(np.float32) / 255
        found = test_controlnet.theirs(nets[-1], x, context, hint, 0.6)
        options["down_block_additional_residuals"] = found.down_block_res_samples
        options["mid_block_additional_residual"] = found.mid_block_res_sample

    each = [
        [f * s for f in theirs(net, own)]
        for net, own, s in zip(nets, shown, scales, strict=True)
        if is_adapter(net)
    ]
    most = max(map(len, each))
    features = [sum(own[i] for own in each if i < len(own)) for i in range(most)]
    arguments = list(map(torch.from_numpy, (x, T, context)))
    expected = model.theirs(*arguments, down_intrablock_additional_residuals=features, **options).sample

    def whole(params, params_of_nets, x, context, shown):
        models = [
            nnx.merge(net.graphdef, nnx.State(own)) for net, own in zip(nets, params_of_nets, strict=True)
        ]
        seen = [own.look(each / jnp.float32(255)) for own, each in zip(models, shown, strict=True)]
        at_each_step = [own for own in models if not isinstance(own, T2IAdapter)]
        t, reads = jnp.asarray(T), [context] * len(at_each_step)
        control = said(lambda: at_each_step, x, t, reads, seen, jnp.asarray(scales, jnp.float32), None)
        unet = nnx.merge(model.graphdef, nnx.State(params))
        assert isinstance(unet, UNet2DConditionModel)
        return unet(x, t, context, control=control)

    found = compiled(whole)(model.params, [net.params for net in nets], nhwc(x), context, shown)
    assert_same(nchw(found), expected)
    plain = model.theirs(*arguments, **options).sample
    assert (plain - expected).abs().max() > 0.1  # that they add something is seen


def is_adapter(net: Twin) -> bool:
    return isinstance(net.original, diffusers.T2IAdapter)
