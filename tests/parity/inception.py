"""FID's network in PyTorch with random weights: written down here, and torch-fidelity's.

torch-fidelity brings torchvision, which must be built for the very PyTorch that is installed; where it is
not, transformers and diffusers cannot be imported at all. So it is no part of the tests' extra: what is
written down here stands in for it, and after `pip install torch-fidelity` the original is held against too.
"""

import pathlib
import tempfile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.common import random_weights

ORIGINALS = ("written down", "torch-fidelity")


def original(which: str = ORIGINALS[0]) -> nn.Module:
    """Calls take uint8 (B, 3, H, W) and give ((B, 2048),). Its features tell pictures apart."""
    module = random_weights(Written() if which == ORIGINALS[0] else _torch_fidelity_s())
    generator = torch.Generator().manual_seed(1)
    for name, buffer in module.named_buffers():
        noise = torch.rand(buffer.shape, generator=generator)
        if name.endswith("running_mean"):
            buffer.copy_(noise - 0.5)
        elif name.endswith("running_var"):  # about what a ReLU leaves: the scale stays
            buffer.copy_(0.2 + 0.4 * noise)
    return module.eval().requires_grad_(False)


def _torch_fidelity_s() -> nn.Module:
    """Without its download."""
    original = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Unfilled(original.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            """Not from the empty file: `original` fills it."""

    with tempfile.TemporaryDirectory() as folder:
        empty = pathlib.Path(folder) / "empty.pth"
        torch.save({}, empty)
        return Unfilled("inception", ["2048"], str(empty))


def resize(images: torch.Tensor, side: int = 299) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, side, side) as TensorFlow 1 did: pixel i is i * old / new, none is smoothed."""
    for axis in (3, 2):
        old = images.shape[axis]
        places = torch.arange(side, dtype=torch.float32) * torch.tensor(old / side, dtype=torch.float32)
        low = places.long()
        part = (places - low).reshape([side if i == axis else 1 for i in range(4)])
        first = images.index_select(axis, low)
        images = first + (images.index_select(axis, (low + 1).clamp(max=old - 1)) - first) * part
    return images


class Conv(nn.Module):
    def __init__(self, channels, out, size, **how):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, bias=False, **how)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def same(size):
    """The size of a window and the padding that keeps the picture's."""
    return {"size": size, "padding": tuple(side // 2 for side in size)}


class Block(nn.Module):
    """Ways from the input to one output, side by side: names of layers, "average" or "maximum"."""

    def __init__(self, channels, layers, ways):
        super().__init__()
        for name, (before, out, how) in layers.items():
            setattr(self, name, Conv(before or channels, out, **how))
        self.ways = ways

    def forward(self, x):
        return torch.cat([self.go(x, way) for way in self.ways], 1)

    def go(self, x, way):
        for name in way:
            if name == "average":
                x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            elif name == "maximum":
                x = F.max_pool2d(x, 3, 1, 1)
            elif name == "halved":
                x = F.max_pool2d(x, 3, 2)
            else:
                x = getattr(self, name)(x)
        return x


ONE, THREE, FIVE = (same((side, side)) for side in (1, 3, 5))
ROW3, COLUMN3, ROW7, COLUMN7 = same((1, 3)), same((3, 1)), same((1, 7)), same((7, 1))
HALVING = {"size": 3, "stride": 2}


def block_a(channels, pooled):
    layers = {
        "branch1x1": (None, 64, ONE),
        "branch5x5_1": (None, 48, ONE),
        "branch5x5_2": (48, 64, FIVE),
        "branch3x3dbl_1": (None, 64, ONE),
        "branch3x3dbl_2": (64, 96, THREE),
        "branch3x3dbl_3": (96, 96, THREE),
        "branch_pool": (None, pooled, ONE),
    }
    double = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    ways = [("branch1x1",), ("branch5x5_1", "branch5x5_2"), double, ("average", "branch_pool")]
    return Block(channels, layers, ways)


def block_b(channels):
    layers = {
        "branch3x3": (None, 384, HALVING),
        "branch3x3dbl_1": (None, 64, ONE),
        "branch3x3dbl_2": (64, 96, THREE),
        "branch3x3dbl_3": (96, 96, HALVING),
    }
    double = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    return Block(channels, layers, [("branch3x3",), double, ("halved",)])


def block_c(channels, inner):
    layers = {
        "branch1x1": (None, 192, ONE),
        "branch7x7_1": (None, inner, ONE),
        "branch7x7_2": (inner, inner, ROW7),
        "branch7x7_3": (inner, 192, COLUMN7),
        "branch7x7dbl_1": (None, inner, ONE),
        "branch7x7dbl_2": (inner, inner, COLUMN7),
        "branch7x7dbl_3": (inner, inner, ROW7),
        "branch7x7dbl_4": (inner, inner, COLUMN7),
        "branch7x7dbl_5": (inner, 192, ROW7),
        "branch_pool": (None, 192, ONE),
    }
    single = tuple(f"branch7x7_{i}" for i in (1, 2, 3))
    double = tuple(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))
    return Block(channels, layers, [("branch1x1",), single, double, ("average", "branch_pool")])


def block_d(channels):
    layers = {
        "branch3x3_1": (None, 192, ONE),
        "branch3x3_2": (192, 320, HALVING),
        "branch7x7x3_1": (None, 192, ONE),
        "branch7x7x3_2": (192, 192, ROW7),
        "branch7x7x3_3": (192, 192, COLUMN7),
        "branch7x7x3_4": (192, 192, HALVING),
    }
    wide = tuple(f"branch7x7x3_{i}" for i in (1, 2, 3, 4))
    return Block(channels, layers, [("branch3x3_1", "branch3x3_2"), wide, ("halved",)])


def block_e(channels, pool):
    layers = {
        "branch1x1": (None, 320, ONE),
        "branch3x3_1": (None, 384, ONE),
        "branch3x3_2a": (384, 384, ROW3),
        "branch3x3_2b": (384, 384, COLUMN3),
        "branch3x3dbl_1": (None, 448, ONE),
        "branch3x3dbl_2": (448, 384, THREE),
        "branch3x3dbl_3a": (384, 384, ROW3),
        "branch3x3dbl_3b": (384, 384, COLUMN3),
        "branch_pool": (None, 192, ONE),
    }
    double = ("branch3x3dbl_1", "branch3x3dbl_2")
    ways = [("branch1x1",), ("branch3x3_1", "branch3x3_2a"), ("branch3x3_1", "branch3x3_2b")]
    ways += [(*double, "branch3x3dbl_3a"), (*double, "branch3x3dbl_3b"), (pool, "branch_pool")]
    return Block(channels, layers, ways)


class Written(nn.Module):
    """InceptionV3 of 2015-12-05 with its 1008 classes."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, **HALVING)
        self.Conv2d_2a_3x3 = Conv(32, 32, size=3)
        self.Conv2d_2b_3x3 = Conv(32, 64, **THREE)
        self.Conv2d_3b_1x1 = Conv(64, 80, size=1)
        self.Conv2d_4a_3x3 = Conv(80, 192, size=3)
        self.Mixed_5b, self.Mixed_5c = block_a(192, 32), block_a(256, 64)
        self.Mixed_5d, self.Mixed_6a = block_a(288, 64), block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        x = (resize(images.float()) - 128) / 128
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            if name != "fc":
                x = layer(x)
        return (x.mean((2, 3)),)
