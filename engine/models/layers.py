"""The small parts that the U-Net and the autoencoder share. Channels last, attributes named as in PyTorch."""

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from engine.models import remat
from engine.types import UserError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def activation(name: str, where: str) -> Callable[[Array], Array]:
    """The activation that PyTorch calls `name`; `where` is the config it came from, for the message."""
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_positive(config: Any, *names: str) -> None:
    """Raises UserError for an option, one number or a list, that is below 1 or empty."""
    for name in names:
        value = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            raise UserError(f"{name}={value!r}: write whole numbers from 1")


_outlining = contextvars.ContextVar("outlining", default=False)


def outline(build: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """A module with shapes for parameters.

    Flax draws them even so, with tracers for numbers: half of the time that the U-Net of Stable Diffusion
    took. So `spread` draws none here, and `host_rngs` counts none.
    """
    token = _outlining.set(True)
    try:
        return nnx.eval_shape(lambda: build(host_rngs()))
    finally:
        _outlining.reset(token)


def spread(scale: float) -> nnx.Initializer:
    """Draws parameters whose outputs have `scale` times the variance of their inputs."""
    draw = nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal")

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, **how: Any) -> jax.Array:
        return jnp.zeros(shape, dtype) if _outlining.get() else draw(key, shape, dtype, **how)

    return init


DEFAULT_INIT = spread(1.0)  # lecun_normal


class _HostCounted(nnx.RngStream):
    def __call__(self) -> jax.Array:
        if _outlining.get():
            return self.key[...]
        key = jax.random.fold_in(self.key[...], self.drawn)
        self.drawn += 1
        return key


def host_rngs(seed: int = 0) -> nnx.Rngs:
    """nnx.Rngs(seed), the same keys, counted in a Python number: what builds a model inside a trace.

    Flax counts in an array. Under eval_shape and jit that is a tracer, whose missing sharding is asked for
    at every parameter, each time with an error message made from the whole program so far: 6 of the 7
    seconds that it took to outline the U-Net of Stable Diffusion.
    """
    stream = _HostCounted(seed, tag="default")
    stream.drawn = 0
    rngs = nnx.Rngs(seed)
    rngs.default = stream
    return rngs


class Identity(nnx.Module):
    """Holds a place in a list where PyTorch has a layer without parameters, so that indices agree."""

    def __call__(self, x):
        return x


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    kernel_init: nnx.Initializer = DEFAULT_INIT,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer."""
    return nnx.Linear(in_features, out_features, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs)


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    use_bias: bool = True,
    kernel_init=DEFAULT_INIT,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution with PyTorch's symmetric padding (by default the one that keeps the size)."""
    padding = kernel // 2 if padding is None else padding
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel, kernel),
        strides=stride,
        padding=((padding, padding), (padding, padding)),
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=convolved,
        rngs=rngs,
    )


def convolved(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "K K C D"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **how: Any,
) -> Float[Array, "B h w D"]:
    """`lax.conv_general_dilated`; where the picture is smaller than the kernel, as one product.

    XLA's CPU compiler has no fast kernel for those: 2 x 2 of 256 channels took 50 times as long.
    """
    K, size = kernel.shape[0], [n + sum(pads) for n, pads in zip(x.shape[1:3], padding, strict=True)]
    if min(x.shape[1:3]) >= K or min(size) < K:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **how)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = ((n - K) // stride + 1 for n, stride in zip(size, strides, strict=True))
    rows, columns = strides
    taps = [
        x[:, i : i + (h - 1) * rows + 1 : rows, j : j + (w - 1) * columns + 1 : columns]
        for i in range(K)
        for j in range(K)
    ]
    return jnp.concatenate(taps, -1) @ kernel.reshape(-1, kernel.shape[-1])


class GroupNorm(nnx.Module):
    """Group normalization (Wu & He 2018), with statistics in float32.

    The moments are first taken over H and W for each channel, then joined over the channels of a group
    (Chan et al. 1979: the variance of a union is the mean of the variances plus the variance of the
    means). It is several times faster on CPUs than one reduction over (H, W, C/G), and as exact.
    """

    def __init__(self, num_groups: int, num_channels: int, *, epsilon: float, rngs: nnx.Rngs):
        if num_channels % num_groups:
            raise UserError(f"norm_num_groups={num_groups} does not divide {num_channels} channels")
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(num_channels))
        self.bias = nnx.Param(jnp.zeros(num_channels))

    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        B, *space, C = x.shape
        axes = tuple(range(1, 1 + len(space)))
        x32 = x.astype(jnp.float32)
        mean = x32.mean(axes, keepdims=True)
        var = jnp.square(x32 - mean).mean(axes).reshape(B, self.num_groups, -1)
        mean = mean.reshape(B, self.num_groups, -1)
        group_mean = mean.mean(-1, keepdims=True)
        group_var = var.mean(-1, keepdims=True) + jnp.square(mean - group_mean).mean(-1, keepdims=True)

        inverse = jax.lax.rsqrt(group_var + self.epsilon)
        scale = inverse * self.scale[...].astype(jnp.float32).reshape(self.num_groups, -1)
        bias = self.bias[...].astype(jnp.float32).reshape(self.num_groups, -1) - group_mean * scale
        shape = (B, *(1 for _ in space), C)
        return (x32 * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


def sinusoidal_embedding(
    t: Float[Array, " B"], dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "B D"]:
    """Timesteps as sines and cosines of 10000^(-i / (dim/2 - freq_shift)) t (Ho et al. 2020), float32."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nnx.Module):
    """Two linear layers from the sinusoidal embedding to the vector that every residual block receives.

    Args:
      cond_channels: of a second embedding that is added to the first; None: there is none.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        act: Callable,
        cond_channels: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        if cond_channels is not None:
            self.cond_proj = linear(cond_channels, in_channels, use_bias=False, rngs=rngs)
        self.linear_1 = linear(in_channels, dim, rngs=rngs)
        self.linear_2 = linear(dim, dim, rngs=rngs)
        self.act = act

    def __call__(
        self, x: Float[Array, "B C"], cond: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B D"]:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(self.act(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """norm, act, conv, (+ time), norm, act, conv, + shortcut.

    Args:
      temb_channels: width of the time embedding; None in the autoencoder, which has no time.
      time_scale_shift: "default" adds the projected embedding before the second norm; "scale_shift"
        multiplies and adds after it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None,
        groups: int,
        epsilon: float,
        act: Callable,
        time_scale_shift: str = "default",
        output_scale_factor: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(groups, in_channels, epsilon=epsilon, rngs=rngs)
        self.conv1 = conv(in_channels, out_channels, 3, rngs=rngs)
        if temb_channels is not None:
            width = 2 * out_channels if time_scale_shift == "scale_shift" else out_channels
            self.time_emb_proj = linear(temb_channels, width, rngs=rngs)
        self.norm2 = GroupNorm(groups, out_channels, epsilon=epsilon, rngs=rngs)
        self.conv2 = conv(out_channels, out_channels, 3, rngs=rngs)
        if in_channels != out_channels:
            self.conv_shortcut = conv(in_channels, out_channels, 1, rngs=rngs)
        self.act = act
        self.time_scale_shift = time_scale_shift
        self.output_scale_factor = output_scale_factor
        self.has_shortcut = in_channels != out_channels

    @remat.block
    def __call__(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "B D"] | None = None
    ) -> Float[Array, "B H W O"]:
        h = self.conv1(self.act(self.norm1(x)))
        if temb is None:
            h = self.norm2(h)
        else:
            temb = self.time_emb_proj(self.act(temb))[:, None, None, :]
            if self.time_scale_shift == "scale_shift":
                scale, shift = jnp.split(temb, 2, axis=-1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + temb)
        h = self.conv2(self.act(h))
        if self.has_shortcut:
            x = self.conv_shortcut(x)
        return (x + h) / self.output_scale_factor


class Downsample2D(nnx.Module):
    """A convolution of stride 2. padding 0 pads right and bottom alone, as the autoencoder does."""

    def __init__(self, channels: int, *, padding: int, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, stride=2, padding=padding, rngs=rngs)
        self.pad = padding == 0

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        if self.pad:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


def resize_nearest(x: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
    """Nearest neighbour with PyTorch's indices floor(i * old / new)."""
    for axis, new in zip((1, 2), size, strict=True):
        old = x.shape[axis]
        if new == 2 * old:  # the common case, which XLA turns into a broadcast
            x = jnp.repeat(x, 2, axis=axis)
        elif new != old:
            x = jnp.take(x, jnp.arange(new) * old // new, axis=axis)
    return x


# [p, r, i]: whether in a row of parity p the kernel's row i lies over the r-th of the two rows that it covers
HALVED = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


class Upsample2D(nnx.Module):
    """Nearest neighbour to twice the size, or to `size` where the way down met odd sizes; then a conv."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w C"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B H W C"]:
        B, h, w, C = x.shape

        def in_two(x):
            return self.conv(resize_nearest(x, size or (2 * h, 2 * w)))

        # Where pixels are few, it takes more than it spares to add up the weights.
        if size not in (None, (2 * h, 2 * w)) or B * h * w < 4 * C:
            return in_two(x)
        return jax.lax.platform_dependent(x, cpu=self.in_one, default=in_two)

    def in_one(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        """To twice the size with 4/9 of the arithmetic, and without the larger picture: faster on CPUs.

        Under the 3 x 3 of the kernel lie 2 x 2 of the smaller picture; which of them depends on whether the
        row and the column are even. So there are four kernels of 2 x 2, of sums of the weights.
        """
        B, h, w, _ = x.shape
        kernel = jnp.einsum("pri,qsj,ijcd->rscpqd", HALVED, HALVED, self.conv.kernel[...])
        kernel = kernel.reshape(*kernel.shape[:3], -1).astype(x.dtype)
        # Padded beforehand, as else its derivative is a convolution with a kernel larger than the picture.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        found = convolved(x, kernel, (1, 1), ((0, 0), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        found = found.reshape(B, h + 1, w + 1, 2, 2, -1)
        rows = [jnp.stack([found[:, p : p + h, q : q + w, p, q] for q in (0, 1)], 3) for p in (0, 1)]
        return jnp.stack(rows, 2).reshape(B, 2 * h, 2 * w, -1) + self.conv.bias[...]
