"""InceptionV3 (Szegedy et al. 2015) as FID takes it: TensorFlow's network of 2015-12-05, to its last pool.

Attributes are the keys of torch-fidelity's checkpoint, which are those of pytorch-fid's. It differs from
torchvision's network of that name in its pools: the averages leave out the padding, and the last block takes
a maximum where the others take an average. Without them the figure would be another one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

SIDE = 299  # pixels of the square that the network sees
WIDTH = 2048  # features of a picture
EPSILON = 0.001
SAME = ((1, 1), (1, 1))  # the padding with which a window of 3 x 3 keeps the size


# ---- before the network


class _Between(NamedTuple):
    """Where along an axis each new pixel lies: between two old ones, by a part of the way."""

    low: np.ndarray
    high: np.ndarray
    part: np.ndarray


def _between(old: int, new: int) -> _Between:
    places = np.arange(new, dtype=np.float32) * np.float32(old / new)
    low = places.astype(np.int32)
    return _Between(low, np.minimum(low + 1, old - 1), places - low.astype(np.float32))


def resize(
    images: UInt8[Array, "B H W 3"] | UInt8[np.ndarray, "B H W 3"],
) -> Float[Array, "B 299 299 3"] | Float[np.ndarray, "B 299 299 3"]:
    """0..255 -> 0..255 at the network's size, float32, as `tf.image.resize_bilinear` of TensorFlow 1 did.

    New pixel i lies at i * old / new, half a pixel off what is usual now, and a picture that shrinks is not
    smoothed first. Both are faults and part of FID: the figures in papers were made so. Works under jit too.
    """
    _, height, width, _ = images.shape
    y, x = _between(height, SIDE), _between(width, SIDE)

    def across(rows):
        low, high = (rows[:, :, columns].astype(np.float32) for columns in (x.low, x.high))
        return low + (high - low) * x.part[:, None]

    top, bottom = across(images[:, y.low]), across(images[:, y.high])
    return top + (bottom - top) * y.part[:, None, None]


# ---- the network


class BasicConv2d(nnx.Module):
    """A convolution without bias, batch normalization by the statistics of the training, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            in_channels,
            out_channels,
            kernel,
            strides=stride,
            padding=[(side, side) for side in padding],
            use_bias=False,
            precision="highest",  # the fast products of GPUs and TPUs would make figures of their own
            rngs=rngs,
        )
        self.bn = BatchNorm(out_channels)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        return jax.nn.relu(self.bn(self.conv(x)))


class BatchNorm(nnx.Module):
    """Batch normalization (Ioffe & Szegedy 2015) after the training: its statistics are params."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.running_mean = nnx.Param(jnp.zeros(channels))
        self.running_var = nnx.Param(jnp.ones(channels))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        scale = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + EPSILON)
        return (x - self.running_mean[...]) * scale + self.bias[...]


def square(side: int, in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> BasicConv2d:
    """A window of side x side that keeps the size."""
    return BasicConv2d(in_channels, out_channels, (side, side), padding=(side // 2, side // 2), rngs=rngs)


def row(length: int, in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> BasicConv2d:
    """A window of 1 x length that keeps the size."""
    return BasicConv2d(in_channels, out_channels, (1, length), padding=(0, length // 2), rngs=rngs)


def column(length: int, in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> BasicConv2d:
    """A window of length x 1 that keeps the size."""
    return BasicConv2d(in_channels, out_channels, (length, 1), padding=(length // 2, 0), rngs=rngs)


def halving(in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> BasicConv2d:
    """A window of 3 x 3 at every second place, unpadded."""
    return BasicConv2d(in_channels, out_channels, (3, 3), stride=2, rngs=rngs)


def average(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Of the window of 3 x 3, without what lies outside of the picture."""
    return nnx.avg_pool(x, (3, 3), padding=SAME, count_include_pad=False)


def halved(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """The maximum of a window of 3 x 3 at every second place, unpadded."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


class InceptionA(nnx.Module):
    def __init__(self, channels: int, pool_features: int, rngs: nnx.Rngs):
        self.branch1x1 = square(1, channels, 64, rngs=rngs)
        self.branch5x5_1 = square(1, channels, 48, rngs=rngs)
        self.branch5x5_2 = square(5, 48, 64, rngs=rngs)
        self.branch3x3dbl_1 = square(1, channels, 64, rngs=rngs)
        self.branch3x3dbl_2 = square(3, 64, 96, rngs=rngs)
        self.branch3x3dbl_3 = square(3, 96, 96, rngs=rngs)
        self.branch_pool = square(1, channels, pool_features, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W O"]:
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.branch3x3 = halving(channels, 384, rngs=rngs)
        self.branch3x3dbl_1 = square(1, channels, 64, rngs=rngs)
        self.branch3x3dbl_2 = square(3, 64, 96, rngs=rngs)
        self.branch3x3dbl_3 = halving(96, 96, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), double, halved(x)], axis=-1)


class InceptionC(nnx.Module):
    def __init__(self, channels: int, channels_7x7: int, rngs: nnx.Rngs):
        c7 = channels_7x7
        self.branch1x1 = square(1, channels, 192, rngs=rngs)
        self.branch7x7_1 = square(1, channels, c7, rngs=rngs)
        self.branch7x7_2 = row(7, c7, c7, rngs=rngs)
        self.branch7x7_3 = column(7, c7, 192, rngs=rngs)
        self.branch7x7dbl_1 = square(1, channels, c7, rngs=rngs)
        self.branch7x7dbl_2 = column(7, c7, c7, rngs=rngs)
        self.branch7x7dbl_3 = row(7, c7, c7, rngs=rngs)
        self.branch7x7dbl_4 = column(7, c7, c7, rngs=rngs)
        self.branch7x7dbl_5 = row(7, c7, 192, rngs=rngs)
        self.branch_pool = square(1, channels, 192, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W O"]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionD(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.branch3x3_1 = square(1, channels, 192, rngs=rngs)
        self.branch3x3_2 = halving(192, 320, rngs=rngs)
        self.branch7x7x3_1 = square(1, channels, 192, rngs=rngs)
        self.branch7x7x3_2 = row(7, 192, 192, rngs=rngs)
        self.branch7x7x3_3 = column(7, 192, 192, rngs=rngs)
        self.branch7x7x3_4 = halving(192, 192, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        wide = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(wide), halved(x)]
        return jnp.concatenate(branches, axis=-1)


class InceptionE(nnx.Module):
    """The last two blocks.

    Args:
      pool_maximum: pools by the maximum, as the second one does in TensorFlow's network, maybe by mistake.
    """

    def __init__(self, channels: int, pool_maximum: bool, rngs: nnx.Rngs):
        self.branch1x1 = square(1, channels, 320, rngs=rngs)
        self.branch3x3_1 = square(1, channels, 384, rngs=rngs)
        self.branch3x3_2a = row(3, 384, 384, rngs=rngs)
        self.branch3x3_2b = column(3, 384, 384, rngs=rngs)
        self.branch3x3dbl_1 = square(1, channels, 448, rngs=rngs)
        self.branch3x3dbl_2 = square(3, 448, 384, rngs=rngs)
        self.branch3x3dbl_3a = row(3, 384, 384, rngs=rngs)
        self.branch3x3dbl_3b = column(3, 384, 384, rngs=rngs)
        self.branch_pool = square(1, channels, 192, rngs=rngs)
        self.pool_maximum = pool_maximum

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W O"]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = nnx.max_pool(x, (3, 3), padding=SAME) if self.pool_maximum else average(x)
        branches = [
            self.branch1x1(x),
            *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nnx.Module):
    """Pictures -> features, whose mean and covariance FID compares (Heusel et al. 2017)."""

    def __init__(self, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = halving(3, 32, rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, (3, 3), rngs=rngs)
        self.Conv2d_2b_3x3 = square(3, 32, 64, rngs=rngs)
        self.Conv2d_3b_1x1 = square(1, 64, 80, rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, (3, 3), rngs=rngs)
        self.Mixed_5b = InceptionA(192, 32, rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs)
        self.Mixed_6a = InceptionB(288, rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs)
        self.Mixed_7a = InceptionD(768, rngs)
        self.Mixed_7b = InceptionE(1280, False, rngs)
        self.Mixed_7c = InceptionE(2048, True, rngs)

    def __call__(self, images: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """Pictures from `resize`, 0..255."""
        x = (images - 128) / 128
        x = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((1, 2))
