"""Networks that enlarge a finished picture: ESRGAN's and Real-ESRGAN's, as people hand them around.

  RRDBNet          residual in residual dense blocks (Wang et al. 2018, "ESRGAN", section 3.1), as most of
                   what was trained since; for a factor below 4 the picture is folded first (Wang et al. 2021,
                   "Real-ESRGAN", section 3.2)
  SRVGGNetCompact  a plain row of convolutions at the size of the picture, much less work (realesr-general,
                   realesr-animevideo, "compact")

Attributes are the keys of BasicSR's checkpoints. Pictures are in [0, 1], before and behind.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from engine.models.layers import conv, convolved, resize_nearest

LEAK = 0.2  # of the leaky ReLUs
PART = 0.2  # of what a block makes that is added to what it was given


@dataclasses.dataclass(frozen=True)
class RRDBConfig:
    """All of it can be read from the shapes of the weights."""

    features: int = 64
    growth: int = 32  # channels that each convolution of a dense block adds
    blocks: int = 23
    ups: int = 2  # doublings
    fold: int = 1  # the picture comes in as so many times fewer pixels along a side, of more channels

    @property
    def depth(self) -> int:
        """Blocks, and doublings."""
        return self.blocks + self.ups

    @property
    def scale(self) -> int:
        """How many times as wide and high the picture becomes."""
        return 2**self.ups // self.fold


@dataclasses.dataclass(frozen=True)
class CompactConfig:
    """All of it can be read from the shapes of the weights."""

    features: int = 64
    layers: int = 32  # convolutions between the first and the last
    scale: int = 4

    @property
    def depth(self) -> int:
        """Convolutions."""
        return self.layers + 2


UpscalerConfig = RRDBConfig | CompactConfig


class ResidualDenseBlock(nnx.Module):
    """Five convolutions, each of which sees what all before it made."""

    def __init__(self, features: int, growth: int, rngs: nnx.Rngs):
        self.conv1 = conv(features, growth, 3, rngs=rngs)
        self.conv2 = conv(features + growth, growth, 3, rngs=rngs)
        self.conv3 = conv(features + 2 * growth, growth, 3, rngs=rngs)
        self.conv4 = conv(features + 3 * growth, growth, 3, rngs=rngs)
        self.conv5 = conv(features + 4 * growth, features, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return jax.lax.platform_dependent(x, tpu=self.in_parts, default=self.together)

    def together(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """All that was made is put together for each convolution."""
        seen = x
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = jnp.concatenate([seen, _leaky(layer(seen))], -1)
        return x + PART * self.conv5(seen)

    def in_parts(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The same without copies: a convolution of all is the sum of those of what was made, one by one.

        TPUs, whose compiler cuts a single picture up before each convolution, move 0.28 of the bytes so; CPUs
        take a quarter longer.
        """
        made = [x]
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            made.append(_leaky(_convolved_in_parts(layer, made)))
        return x + PART * _convolved_in_parts(self.conv5, made)


class RRDB(nnx.Module):
    """Three dense blocks, beside the way straight on."""

    def __init__(self, features: int, growth: int, rngs: nnx.Rngs):
        self.rdb1 = ResidualDenseBlock(features, growth, rngs)
        self.rdb2 = ResidualDenseBlock(features, growth, rngs)
        self.rdb3 = ResidualDenseBlock(features, growth, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + PART * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nnx.Module):
    """Pictures in [0, 1] to pictures `scale` times as wide and high, in about [0, 1]."""

    def __init__(self, config: RRDBConfig, rngs: nnx.Rngs):
        width = config.features
        self.config = config
        self.conv_first = conv(3 * config.fold**2, width, 3, rngs=rngs)
        self.body = nnx.List([RRDB(width, config.growth, rngs) for _ in range(config.blocks)])
        self.conv_body = conv(width, width, 3, rngs=rngs)
        for i in range(1, config.ups + 1):
            setattr(self, f"conv_up{i}", conv(width, width, 3, rngs=rngs))
        self.conv_hr = conv(width, width, 3, rngs=rngs)
        self.conv_last = conv(width, 3, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B H2 W2 3"]:
        fold, (height, width) = self.config.fold, x.shape[1:3]
        # A picture that cannot be folded grows at its end first, by what is there; that is cut off again.
        x = jnp.pad(x, ((0, 0), (0, -height % fold), (0, -width % fold), (0, 0)), mode="reflect")
        first = self.conv_first(folded(x, fold))
        x = first
        for block in self.body:
            x = block(x)
        x = first + self.conv_body(x)
        for i in range(1, self.config.ups + 1):
            larger = resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2]))
            x = _leaky(getattr(self, f"conv_up{i}")(larger))
        x = self.conv_last(_leaky(self.conv_hr(x)))
        return x[:, : height * self.config.scale, : width * self.config.scale]


class PReLU(nnx.Module):
    """What is below 0 is scaled, each channel by a number of its own."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.full(features, 0.25))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return jnp.where(x > 0, x, self.scale * x)


class SRVGGNetCompact(nnx.Module):
    """Pictures in [0, 1] to pictures `scale` times as wide and high, in about [0, 1]."""

    def __init__(self, config: CompactConfig, rngs: nnx.Rngs):
        self.config, width = config, config.features
        layers = [conv(3, width, 3, rngs=rngs), PReLU(width)]
        for _ in range(config.layers):
            layers += [conv(width, width, 3, rngs=rngs), PReLU(width)]
        self.body = nnx.List([*layers, conv(width, 3 * config.scale**2, 3, rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B H2 W2 3"]:
        plain = resize_nearest(x, (self.config.scale * x.shape[1], self.config.scale * x.shape[2]))
        for layer in self.body:
            x = layer(x)
        return plain + unfolded(x, self.config.scale)


def module_of(config: UpscalerConfig) -> type[nnx.Module]:
    """The network that a config is of."""
    return RRDBNet if isinstance(config, RRDBConfig) else SRVGGNetCompact


def folded(x: Float[Array, "B H W C"], by: int) -> Float[Array, "B h w F"]:
    """by x by neighbours become channels of one place; channel c of them at (i, j) is c by^2 + i by + j."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // by, by, W // by, by, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // by, W // by, C * by**2)


def unfolded(x: Float[Array, "B h w F"], by: int) -> Float[Array, "B H W C"]:
    """What `folded` undoes."""
    B, h, w, F = x.shape
    x = x.reshape(B, h, w, F // by**2, by, by)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, h * by, w * by, F // by**2)


def _convolved_in_parts(layer: nnx.Conv, made: Sequence[Array]) -> Array:
    places = np.cumsum([each.shape[-1] for each in made])[:-1]
    kernels = jnp.split(layer.kernel[...], places, axis=2)
    pads = ((1, 1), (1, 1))
    axes = ("NHWC", "HWIO", "NHWC")
    parts = (
        convolved(x, kernel, (1, 1), pads, dimension_numbers=axes)
        for x, kernel in zip(made, kernels, strict=True)
    )
    return sum(parts, layer.bias[...])


def _leaky(x: Array) -> Array:
    return jax.nn.leaky_relu(x, LEAK)
