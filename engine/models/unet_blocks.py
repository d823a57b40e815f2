"""The levels of a U-Net: residual blocks with attention behind them, down, in the middle and up."""

import jax.numpy as jnp
from flax import nnx

from engine.models.layers import Downsample2D, Upsample2D


class DownBlock2D(nnx.Module):
    """Residual blocks, each followed by attention where `transformer` is given; then half the size.

    depths: layers of the transformer behind each residual block.
    """

    def __init__(self, in_channels, out_channels, *, depths, downsample, resnet, transformer, padding, rngs):
        self.resnets = nnx.List(
            [resnet(in_channels if i == 0 else out_channels, out_channels) for i in range(len(depths))]
        )
        if transformer:
            self.attentions = nnx.List([transformer(out_channels, layers=depth) for depth in depths])
        if downsample:
            self.downsamplers = nnx.List([Downsample2D(out_channels, padding=padding, rngs=rngs)])
        self.has_attention = transformer is not None
        self.has_downsampler = downsample
        # Where a T2I-Adapter adds to it: before the size changes, but for SDXL's level without attention.
        self._added_below = downsample and not self.has_attention

    def __call__(self, x, temb, context, feature=None):
        """feature: what is added to it, see engine.models.t2i_adapter."""
        x, skips = self.at_full_size(x, temb, context, feature)
        x, more = self.down(x, feature)
        return x, skips + more

    def at_full_size(self, x, temb, context, feature=None):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.has_attention:
                x = self.attentions[i](x, context)
            skips.append(x)
        if feature is not None and not self._added_below:
            x = skips[-1] = x + feature
        return x, skips

    def down(self, x, feature=None):
        if not self.has_downsampler:
            return x, []
        x = self.downsamplers[0](x)
        if feature is not None and self._added_below:
            x = x + feature
        return x, [x]


class UpBlock2D(nnx.Module):
    """As on the way down, with the skip of the same size joined to each residual block's input."""

    def __init__(
        self, in_channels, out_channels, skip_channels, *, depths, upsample, resnet, transformer, rngs
    ):
        self.resnets = nnx.List(
            [
                resnet((in_channels if i == 0 else out_channels) + skip, out_channels)
                for i, skip in enumerate(skip_channels)
            ]
        )
        if transformer:
            self.attentions = nnx.List([transformer(out_channels, layers=depth) for depth in depths])
        if upsample:
            self.upsamplers = nnx.List([Upsample2D(out_channels, rngs=rngs)])
        self.has_attention = transformer is not None
        self.has_upsampler = upsample

    def __call__(self, x, skips, temb, context, size):
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), temb)
            if self.has_attention:
                x = self.attentions[i](x, context)
        return self.upsamplers[0](x, size) if self.has_upsampler else x


class MidBlock2D(nnx.Module):
    """The narrowest place: a residual block, and with a transformer also attention and a second one."""

    def __init__(self, channels, *, depth, resnet, transformer):
        self.resnets = nnx.List([resnet(channels, channels) for _ in range(2 if transformer else 1)])
        if transformer:
            self.attentions = nnx.List([transformer(channels, layers=depth)])
        self.has_attention = transformer is not None

    def __call__(self, x, temb, context):
        x = self.resnets[0](x, temb)
        if self.has_attention:
            x = self.resnets[1](self.attentions[0](x, context), temb)
        return x
