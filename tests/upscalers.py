"""Small networks that enlarge pictures, with random weights, in PyTorch and as files."""

import pathlib

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F


class Dense(nn.Module):
    def __init__(self, features: int, growth: int):
        super().__init__()
        widths = [features + i * growth for i in range(5)]
        for i, width in enumerate(widths, 1):
            setattr(self, f"conv{i}", nn.Conv2d(width, growth if i < 5 else features, 3, padding=1))

    def forward(self, x):
        parts = [x]
        for i in range(1, 5):
            parts.append(F.leaky_relu(getattr(self, f"conv{i}")(torch.cat(parts, 1)), 0.2))
        return self.conv5(torch.cat(parts, 1)) * 0.2 + x


class Block(nn.Module):
    def __init__(self, features: int, growth: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (Dense(features, growth) for _ in range(3))

    def forward(self, x):
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class RRDBNet(nn.Module):
    """ESRGAN's generator as its paper draws it, with BasicSR's names; folded first as in Real-ESRGAN."""

    def __init__(self, features=8, growth=4, blocks=2, ups=2, fold=1):
        super().__init__()
        self.fold, self.ups = fold, ups
        self.conv_first = nn.Conv2d(3 * fold**2, features, 3, padding=1)
        self.body = nn.Sequential(*(Block(features, growth) for _ in range(blocks)))
        self.conv_body = nn.Conv2d(features, features, 3, padding=1)
        for i in range(1, ups + 1):
            setattr(self, f"conv_up{i}", nn.Conv2d(features, features, 3, padding=1))
        self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_first(F.pixel_unshuffle(x, self.fold))
        x = x + self.conv_body(self.body(x))
        for i in range(1, self.ups + 1):
            x = F.leaky_relu(
                getattr(self, f"conv_up{i}")(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2
            )
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


class Compact(nn.Module):
    """Real-ESRGAN's compact one, with BasicSR's names."""

    def __init__(self, features=8, layers=2, scale=4):
        super().__init__()
        self.scale = scale
        rows = [nn.Conv2d(3, features, 3, padding=1), nn.PReLU(features)]
        for _ in range(layers):
            rows += [nn.Conv2d(features, features, 3, padding=1), nn.PReLU(features)]
        self.body = nn.Sequential(*rows, nn.Conv2d(features, 3 * scale**2, 3, padding=1))

    def forward(self, x):
        return F.pixel_shuffle(self.body(x), self.scale) + F.interpolate(x, scale_factor=self.scale)


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """All of its parameters drawn, so that each counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def tiny_upscaler(path: pathlib.Path, seed: int = 0, **options: int) -> pathlib.Path:
    """A compact one in a file."""
    save_file(randomised(Compact(**options), seed).state_dict(), path)
    return path
