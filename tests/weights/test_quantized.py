"""Kernels in 8 bits: what is stored, what it is worth, and that pictures stay what they are."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

import engine
from engine.parallel import SPLIT, Devices
from engine.types import UserError
from engine.weights import quantized
from engine.weights.folder import load_folder
from tests.parity.pictures import psnr

PROMPTS = ["a red fox", "a blue car"]


pytestmark = pytest.mark.usefixtures("quick_compiler")


def leaves(tree, path=()):
    """(path, leaf) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


@pytest.mark.parametrize("quantize, dtype, largest", [("int8", "int8", 127.5), ("fp8", "float8_e4m3fn", 448)])
def test_what_is_stored(folder, quantize, dtype, largest):
    """Known answer: each output channel in steps of its largest weight."""
    plain = dict(leaves(load_folder(folder).unet.params))
    place = quantized.placing(lambda name, array: jnp.asarray(array), quantize)
    model = load_folder(folder, place=place)
    found, smaller = dict(leaves(model.unet.params)), 0
    for path, leaf in found.items():
        inside = path[0] in ("down_blocks", "mid_block", "up_blocks") and path[-1] == "kernel"
        assert hasattr(leaf, "qvalue") == inside, path
        if not inside:
            np.testing.assert_array_equal(leaf, plain[path])
            continue
        smaller += 1
        w = np.asarray(plain[path])
        scale = np.abs(w).max(tuple(range(w.ndim - 1)), keepdims=True) / largest
        assert (leaf.qvalue.dtype, leaf.qvalue.shape) == (dtype, w.shape)
        np.testing.assert_allclose(leaf.scale, scale, rtol=1e-6)
        if quantize == "int8":
            assert np.abs(leaf.qvalue - w / scale).max() <= 0.51  # the largest lie half way
    assert smaller > 30
    for path, leaf in leaves(quantized.wide(model.unet.params)):
        assert leaf.dtype == jnp.float32
        limit = np.abs(plain[path]).max() * (0.005 if quantize == "int8" else 0.04)
        np.testing.assert_allclose(leaf, plain[path], atol=limit)
    for part in (model.vae, model.text_encoder):
        assert not any(hasattr(leaf, "qvalue") for _, leaf in leaves(part.params))


@pytest.mark.parametrize("quantize, dtype, least", [("int8", "float32", 35), ("fp8", "bfloat16", 22)])
def test_pictures_stay_nearly_the_same(folder, quantize, dtype, least):
    options = {"seed": 7, "steps": 4, "sampler": "euler"}
    whole = engine.load(folder).generate(PROMPTS, **options)
    modes = {}
    for mode in ("shard_map", "jit", "pmap"):
        pipe = engine.load(folder, dtype, mode, quantize=quantize)
        modes[mode] = pipe.generate(PROMPTS, **options)
    assert least < psnr(modes["jit"], whole) < 80
    for images in modes.values():
        assert psnr(images, modes["jit"]) > 45


def test_mistakes(folder, monkeypatch):
    with pytest.raises(
        UserError, match=r"quantize='int9' is unknown \(did you mean int8\?\); write int8 or fp8"
    ):
        engine.load(folder, quantize="int9")
    split = Devices("jit", rules=SPLIT)
    with pytest.raises(UserError, match="quantize='int8' where devices split the model: leave it whole"):
        engine.load(folder, parallel=split, quantize="int8")
    monkeypatch.setitem(sys.modules, "qwix", None)
    quantized._quantizer.cache_clear()
    with pytest.raises(UserError, match=r"quantize='int8' needs qwix: pip install 'fogsculpt\[quantize\]'"):
        engine.load(folder, quantize="int8")
