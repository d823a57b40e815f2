"""A T2I-Adapter (Mou et al. 2023): a small network that sees a picture, and nothing of latent and words.

What it makes of the picture (a sketch, its depth, poses, ...) is added on the U-Net's way down, at the end of
each level, and is the same at every step: it is computed once, where a ControlNet is at each of them.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engine.config import from_json
from engine.models.layers import check_positive, conv
from engine.types import UserError

FULL, FULL_XL, LIGHT = KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # as Pillow makes greys, in which some adapters see

Features = tuple[Float[Array, "B _ _ _"], ...]  # for each level of the U-Net, the uppermost first


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig:
    """config.json of a T2I-Adapter, with the names and defaults of PyTorch diffusers."""

    in_channels: int = 3  # or 1, for greys
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8  # pixels a side that its first layer sees as one place
    adapter_type: str = FULL

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "T2IAdapterConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        return from_json(cls, options, where)

    def __post_init__(self):
        check_positive(self, "channels", "num_res_blocks", "downscale_factor")
        if self.adapter_type not in KINDS:
            raise UserError(f"adapter_type={self.adapter_type!r} is unknown; write one of {', '.join(KINDS)}")
        if self.adapter_type == FULL_XL and len({*self.channels[2:]}) > 1:
            raise UserError(f"channels={self.channels}: of {FULL_XL} the third and those behind it are equal")
        if self.in_channels not in (1, 3):
            raise UserError(f"in_channels={self.in_channels}: pictures have 3, greys 1")

    @property
    def blocks(self) -> tuple[tuple[int, int, bool], ...]:
        """Of each: channels that it takes and gives, and whether it halves the size first."""
        first, last = self.channels[0], self.channels[-1]
        pairs = list(itertools.pairwise(self.channels))
        if self.adapter_type == FULL:
            return (first, first, False), *((*pair, True) for pair in pairs)
        if self.adapter_type == LIGHT:
            seen = self.in_channels * self.downscale_factor**2
            return (seen, first, False), *((*pair, True) for pair in pairs), (last, last, True)
        # SDXL's U-Net attends at two sizes alone
        behind = (
            (*pair, level == 2) if level < 3 else (pair[1], pair[1], False)
            for level, pair in enumerate(pairs, 1)
        )
        return (first, first, False), *behind

    @property
    def features(self) -> tuple[tuple[int, int], ...]:
        """Of each: its channels, and how many pixels a side a place of it stands for."""
        found, scale = [], self.downscale_factor
        for _, channels, halves in self.blocks:
            scale *= 2 if halves else 1
            found.append((channels, scale))
        return tuple(found)


class AdapterResnetBlock(nnx.Module):
    """size: of the second convolution's kernel."""

    def __init__(self, channels: int, size: int, rngs: nnx.Rngs):
        self.block1 = conv(channels, channels, 3, rngs=rngs)
        self.block2 = conv(channels, channels, size, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.block2(jax.nn.relu(self.block1(x))) + x


class AdapterBlock(nnx.Module):
    """One level; a light one works in a quarter of its channels."""

    def __init__(self, taken: int, given: int, halves: bool, config: T2IAdapterConfig, rngs: nnx.Rngs):
        light = config.adapter_type == LIGHT
        width = given // 4 if light else given
        if light or taken != given:
            self.in_conv = conv(taken, width, 1, rngs=rngs)
        self.resnets = nnx.List(
            [AdapterResnetBlock(width, 3 if light else 1, rngs) for _ in range(config.num_res_blocks)]
        )
        if light:
            self.out_conv = conv(width, given, 1, rngs=rngs)
        self.halves = halves

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        if self.halves:  # where a side is odd, the last mean is of what is there
            x = nnx.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)
        for layer in (getattr(self, "in_conv", None), *self.resnets, getattr(self, "out_conv", None)):
            x = x if layer is None else layer(x)
        return x


class _Adapter(nnx.Module):
    """All of it; its checkpoints have one name more in front."""

    def __init__(self, config: T2IAdapterConfig, rngs: nnx.Rngs):
        if config.adapter_type != LIGHT:
            seen = config.in_channels * config.downscale_factor**2
            self.conv_in = conv(seen, config.channels[0], 3, rngs=rngs)
        self.body = nnx.List([AdapterBlock(*each, config, rngs) for each in config.blocks])


class T2IAdapter(nnx.Module):
    """The network; attributes are the keys of its checkpoints."""

    def __init__(self, config: T2IAdapterConfig, rngs: nnx.Rngs):
        self.config = config
        self.adapter = _Adapter(config, rngs)

    def look(self, picture: Float[Array, "B H W 3"]) -> Features:
        """What the network makes of a picture, 0 to 1; its sides are multiples of `downscale_factor`."""
        if self.config.in_channels == 1:
            grey = picture @ jnp.array(LUMA, picture.dtype)
            picture = jnp.floor(grey * 255 + 0.5)[..., None] / 255
        x = _unshuffled(picture, self.config.downscale_factor)
        x = x.astype(self.adapter.body[0].resnets[0].block1.kernel[...].dtype)
        if self.config.adapter_type != LIGHT:
            x = self.adapter.conv_in(x)
        found = []
        for block in self.adapter.body:
            x = block(x)
            found.append(x)
        return tuple(found)


def _unshuffled(x: Float[Array, "B H W C"], factor: int) -> Float[Array, "B h w D"]:
    """All pixels of a cell as channels of one place, in the order of torch's PixelUnshuffle."""
    b, height, width, channels = x.shape
    cells = x.reshape(b, height // factor, factor, width // factor, factor, channels)
    return cells.transpose(0, 1, 3, 5, 2, 4).reshape(b, height // factor, width // factor, -1)
