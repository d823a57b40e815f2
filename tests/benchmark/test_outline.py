"""Models as shapes: what less work leaves of arithmetic and of memory."""

import jax
import pytest
from flax import traverse_util

from engine.benchmark import compiled, compiling, outline
from engine.parallel import Devices
from engine.types import UserError
from tests.tiny import XL, tiny_model


def nbytes(model):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.unet.params))


def test_kernels_in_8_bits_take_half_of_16():
    plain, small = outline.model("tiny"), outline.model("tiny", quantize="int8")
    assert 0.5 < nbytes(small) / nbytes(plain) < 0.56
    devices = Devices("shard_map")
    found = [outline.drawing(model, devices, 128, 1)["unet"] for model in (plain, small)]
    assert compiled.arithmetic(found[0]) == compiled.arithmetic(found[1])


def test_merged_tokens_attend_less():
    model, devices = outline.model("tiny"), Devices("shard_map")
    counts = [
        compiled.arithmetic(outline.drawing(model, devices, 128, 1, merge=share)["unet"])
        for share in (0.0, 0.5)
    ]
    assert counts[1] < counts[0]


def test_words_are_read_before_the_steps():
    """A step with guidance is two calls of the U-Net, without the keys and values of the words."""
    model = outline.model("tiny")
    programs = outline.drawing(model, Devices("shard_map"), 128, 1)
    flat = traverse_util.flatten_dict(model.unet.params)
    reading = [
        leaf.size
        for path, leaf in flat.items()
        if path[-3:] in (("attn2", "to_k", "kernel"), ("attn2", "to_v", "kernel"))
    ]
    call, step = (compiled.arithmetic(programs[name]) for name in ("unet", "sampler"))
    assert reading
    assert step == outline.SEGMENT * 2 * (call - 2 * outline.tokens(model) * sum(reading))


def test_each_controlnet_adds_the_same_to_a_step():
    model, devices = outline.model("tiny"), Devices("shard_map")
    steps = [
        compiled.arithmetic(outline.drawing(model, devices, 128, 1, controlnets=count)["sampler"])
        for count in range(3)
    ]
    assert steps[2] - steps[1] == steps[1] - steps[0]
    assert 0.2 < (steps[1] - steps[0]) / steps[0] < 0.6


@pytest.mark.parametrize("kind", [{}, XL], ids=["sd", "sdxl"])
def test_a_step_of_training_is_three_calls_of_the_unet(kind):
    """One for the loss, and for each product two in the gradient; the optimizer beside it is little."""
    model, devices = tiny_model(**kind), Devices("jit")
    step = compiled.arithmetic(outline.training(model, devices, 64, 1, dtype="float32"))
    call = compiled.arithmetic(outline.drawing(model, devices, 64, 1)["unet"])
    assert step == pytest.approx(3 * call, rel=0.05)


def test_enlarging_is_its_convolutions():
    side, pictures = 16, 2

    def convolution(inputs: int, outputs: int, times: int = 1) -> int:
        return 2 * 9 * inputs * outputs * (times * side) ** 2

    dense = sum(convolution(64 + 32 * i, 32) for i in range(4)) + convolution(64 + 32 * 4, 64)
    small = convolution(3, 64) + 23 * 3 * dense + convolution(64, 64)
    large = convolution(64, 64, 2) + 2 * convolution(64, 64, 4) + convolution(64, 3, 4)
    found = compiled.arithmetic(outline.enlarging(tiny_model(), Devices("shard_map"), side, pictures))
    assert found == pytest.approx(pictures * (small + large), rel=0.02)


DRAWING = "quantize, merge_tokens and split_params are for drawing: leave train out of parts"
BOTH = "quantize='int8' with split_params: leave one of them out"


@pytest.mark.parametrize(
    "part, options, message",
    [
        ("train", {"quantize": "int8"}, DRAWING),
        ("train", {"split": True}, DRAWING),
        ("train", {"merge": 0.9}, "merge_tokens=0.9: write a share of the tokens, from 0 to 0.75"),
        ("unet", {"quantize": "int8", "split": True}, BOTH),
        ("unet", {"controlnets": 1}, "controlnets=1 go with the sampler: write it among parts"),
        ("sampler", {"controlnets": -1}, "controlnets=-1: write a number from 0"),
    ],
)
def test_mistakes(part, options, message):
    with pytest.raises(UserError) as error:
        list(compiling.rows("tiny", "v5e:2x2", [1], None, [part], "none", **options))
    assert str(error.value) == message
