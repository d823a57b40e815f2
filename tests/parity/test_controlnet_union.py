"""ControlNets for many kinds of pictures against diffusers', of one picture and of several at once."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from engine.models.controlnet_union import ControlNetUnionConfig, ControlNetUnionModel
from tests.parity.common import Twin, assert_same, compiled, nchw, nhwc, normal
from tests.parity.test_controlnet import ADDED, HALVING, SHARED
from tests.parity.test_unet import ATTENDS, L, T

UNION = {"num_control_type": 3, "num_trans_channel": 16, "num_proj_channel": 16, "num_trans_head": 2}
SIZE = (6, 4)
# name: (options, kinds of the pictures, their scales)
CASES = {
    "one picture": ({}, (1,), (0.7,)),
    "two at once": ({}, (2, 0), (0.7, 0.4)),
    "two of a kind, deeper": ({"num_trans_layer": 2, "num_control_type": 8}, (6, 6), (1.0, 0.5)),
}


def twins(options: dict) -> Twin:
    """Our model is built from what the original writes as its config.json."""
    options = SHARED | ATTENDS | ADDED | HALVING | UNION | options
    options = {k: v for k, v in options.items() if k not in ("up_block_types", "mid_block_type")}
    original = diffusers.ControlNetUnionModel(**options)
    config = ControlNetUnionConfig.from_json(json.loads(original.to_json_string()), "config.json")
    return Twin(lambda rngs: ControlNetUnionModel(config, rngs), original, "controlnet")


def pictures(count: int) -> list[np.ndarray]:
    """NCHW, 0 to 1; two rows each."""
    rng = np.random.default_rng(2)
    return [rng.random((2, 3, 2 * SIZE[0], 2 * SIZE[1]), np.float32) for _ in range(count)]


BESIDE = normal(2, 5, seed=3), np.array([[512, 640, 0, 8, 512, 640], [9, 8, 7, 6, 5, 4]], np.float32)


def theirs(twin: Twin, row: int, x, context, shown, kinds, scales):
    """Of a row by itself: theirs are of what else is in the batch."""
    count = twin.original.config.num_control_type
    told = torch.zeros(1, count)
    told[0, list(kinds)] = 1
    rows = slice(row, row + 1)
    text, numbers = (torch.from_numpy(each[rows]) for each in BESIDE)
    return twin.theirs(
        *(torch.from_numpy(each[rows]) for each in (x, T, context)),
        controlnet_cond=[torch.from_numpy(each[rows]) for each in shown],
        control_type=told,
        control_type_idx=list(kinds),
        conditioning_scale=list(scales),
        added_cond_kwargs={"text_embeds": text, "time_ids": numbers},
    )


@pytest.mark.parametrize("name", CASES)
def test_what_is_added(name):
    options, kinds, scales = CASES[name]
    twin = twins(options)
    x, context, shown = normal(2, 4, *SIZE), normal(2, L, 12, seed=1), pictures(len(kinds))

    def everything(params, x, context, shown):
        model = nnx.merge(twin.graphdef, nnx.State(params))
        added, read = jax.tree.map(jnp.asarray, BESIDE), model.read(context)
        scale = scales[0] if len(scales) == 1 else 1.0
        seen = model.look_at(shown, kinds, scales)
        near, state = model.near(x, jnp.asarray(T), read, seen, scale, added)
        far, middle = model.deep(state, read, scale)
        return [*near, *far, middle]

    found = compiled(everything)(twin.params, nhwc(x), context, [nhwc(each) for each in shown])
    for row in range(2):
        wanted = theirs(twin, row, x, context, shown, kinds, scales)
        wanted = [*wanted.down_block_res_samples, wanted.mid_block_res_sample]
        assert len(found) == len(wanted)
        for mine, other in zip(found, wanted, strict=True):
            assert_same(nchw(mine[row : row + 1]), other)
