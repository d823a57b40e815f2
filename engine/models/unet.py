"""The U-Net of Stable Diffusion: it sees a noisy latent, the time and the words, and says what is noise."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engine.models.attention import Attention, BasicTransformerBlock, Read, Transformer2DModel
from engine.models.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    activation,
    conv,
    sinusoidal_embedding,
)
from engine.models.unet_config import UNetConfig

Deep = Float[Array, "B H W K"]  # what the lower levels make of x, at its size


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

    def __call__(self, x, temb, context):
        x, skips = self.at_full_size(x, temb, context)
        x, more = self.down(x)
        return x, skips + more

    def at_full_size(self, x, temb, context):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.has_attention:
                x = self.attentions[i](x, context)
            skips.append(x)
        return x, skips

    def down(self, x):
        if not self.has_downsampler:
            return x, []
        x = self.downsamplers[0](x)
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


class UNet2DConditionModel(nnx.Module):
    """F(x, t, context), the network of Rombach et al. 2022; attributes are the keys of its checkpoints."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        channels = config.block_out_channels
        time_dim = 4 * channels[0]
        act = activation(config.act_fn, "act_fn")
        resnet = partial(
            ResnetBlock2D,
            temb_channels=time_dim,
            groups=config.norm_num_groups,
            epsilon=config.norm_eps,
            act=act,
            time_scale_shift=config.resnet_time_scale_shift,
            rngs=rngs,
        )
        self.conv_in = conv(config.in_channels, channels[0], 3, rngs=rngs)
        self.time_embedding = TimestepEmbedding(
            channels[0], time_dim, act, config.time_cond_proj_dim, rngs=rngs
        )
        if config.addition_embed_type:
            width = config.projection_class_embeddings_input_dim
            self.add_embedding = TimestepEmbedding(width, time_dim, act, rngs=rngs)
        self.down_blocks, skip_channels = self._way_down(resnet, rngs)
        if config.mid_block_type is not None:
            attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
            self.mid_block = MidBlock2D(
                channels[-1],
                depth=config.depths(-1)[0],
                resnet=partial(resnet, output_scale_factor=config.mid_block_scale_factor),
                # the mid block always attends to itself as well
                transformer=self._transformer(-1, rngs, only_cross_attention=False) if attends else None,
            )
        self.up_blocks = self._way_up(resnet, skip_channels, rngs)
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, channels[0], epsilon=config.norm_eps, rngs=rngs
        )
        # Alone of all at zero. With every residual branch there too, as in Dhariwal & Nichol 2021
        # (zero_module), the words took twice as long to reach the picture.
        zeros = nnx.initializers.zeros_init()
        self.conv_out = conv(channels[0], config.out_channels, 3, kernel_init=zeros, rngs=rngs)
        self.act = act
        for path, layer in nnx.iter_modules(self):
            if isinstance(layer, Attention):
                layer.place = ".".join(map(str, path))

    def _transformer(self, block: int, rngs: nnx.Rngs, *, only_cross_attention: bool):
        config = self.config
        return partial(
            Transformer2DModel,
            heads=config.per_block("attention_head_dim")[block],
            context_dim=config.per_block("cross_attention_dim")[block],
            groups=config.norm_num_groups,
            use_linear_projection=config.use_linear_projection,
            only_cross_attention=only_cross_attention,
            rngs=rngs,
        )

    def _block_transformer(self, kind: str, block: int, rngs: nnx.Rngs):
        if not kind.startswith("CrossAttn"):
            return None
        only = self.config.per_block("only_cross_attention")[block]
        return self._transformer(block, rngs, only_cross_attention=only)

    def _way_down(self, resnet, rngs):
        config = self.config
        blocks, width = [], config.block_out_channels[0]
        skip_channels = [width]  # conv_in's output is the first skip
        for i, (kind, out) in enumerate(zip(config.down_block_types, config.block_out_channels, strict=True)):
            last = i == len(config.block_out_channels) - 1
            depths = config.depths(i)
            blocks.append(
                DownBlock2D(
                    width,
                    out,
                    depths=depths,
                    downsample=not last,
                    resnet=resnet,
                    transformer=self._block_transformer(kind, i, rngs),
                    padding=config.downsample_padding,
                    rngs=rngs,
                )
            )
            skip_channels += [out] * (len(depths) + (not last))
            width = out
        return nnx.List(blocks), skip_channels

    def _way_up(self, resnet, skip_channels, rngs):
        config = self.config
        blocks, width = [], config.block_out_channels[-1]
        for i, kind in enumerate(config.up_block_types):
            level = len(config.block_out_channels) - 1 - i
            out = config.block_out_channels[level]
            depths = config.depths(level, up=True)
            blocks.append(
                UpBlock2D(
                    width,
                    out,
                    [skip_channels.pop() for _ in depths],
                    depths=depths,
                    upsample=level > 0,
                    resnet=resnet,
                    transformer=self._block_transformer(kind, level, rngs),
                    rngs=rngs,
                )
            )
            width = out
        return nnx.List(blocks)

    def read(self, context: Float[Array, "B L D"]) -> Read:
        """What the layers make of the words, which `__call__` takes in their place: once for many calls."""
        context, found = context.astype(self.conv_in.kernel[...].dtype), {}
        for _, block in nnx.iter_modules(self):
            if isinstance(block, BasicTransformerBlock):
                found |= block.read(context)
        return found

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        context: Float[Array, "B L D"] | Read,
        guidance: Float[Array, " B"] | None = None,
        added: tuple[Float[Array, "B P"], Float[Array, "B N"]] | None = None,
        recall: Callable[[Callable[[], Deep]], Deep] | None = None,
    ) -> Float[Array, "B H W O"]:
        """What the model was trained to say of `x` (eps, v, ...).

        Args:
          x: the scaled noisy latent.
          t: the timestep of each image, 0 to 999, fractions allowed.
          context: the words' vectors, or what `read` made of them.
          guidance: the scale w of distilled guidance, 0 for none (Meng et al. 2023, section 3); for a U-Net
            with `time_cond_proj_dim`.
          added: for a U-Net with `addition_embed_type`: the pooled words, and numbers such as sizes and crops
            in pixels (Podell et al. 2023, SDXL, section 2.2).
          recall: called with what computes the deep feature, which goes into the last block; it returns that,
            or what takes its place (`engine.diffusion.caching`). None: it is computed.
        """
        config = self.config
        dtype = self.conv_in.kernel[...].dtype
        x, context = jax.tree.map(lambda array: array.astype(dtype), (x, context))
        if config.center_input_sample:
            x = 2 * x - 1
        temb = sinusoidal_embedding(
            t,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        temb = self.time_embedding(temb.astype(dtype), self._embedded(guidance, dtype))
        if config.addition_embed_type:
            temb = temb + self._embedded_beside(*added, dtype)

        x = first = self.conv_in(x)
        x, skips = self.down_blocks[0].at_full_size(x, temb, context)
        compute = partial(self._deep, x, temb, context)
        x = recall(compute) if recall else compute()
        x = self.up_blocks[-1](x, [first, *skips], temb, context, None)
        return self.conv_out(self.act(self.conv_norm_out(x)))

    def _deep(self, x: Float[Array, "B H W C"], temb: Float[Array, "B D"], context: Any) -> Deep:
        """All but the blocks of the full size, first and last: what the last one takes up."""
        size = x.shape[1:3]
        x, skips = self.down_blocks[0].down(x)
        for block in self.down_blocks[1:]:
            x, block_skips = block(x, temb, context)
            skips += block_skips
        if self.config.mid_block_type is not None:
            x = self.mid_block(x, temb, context)
        for block in self.up_blocks[:-1]:
            # An odd size was rounded on the way down: go back to the size of the next skip.
            next_skip = len(skips) - len(block.resnets) - 1
            x = block(x, skips, temb, context, skips[next_skip].shape[1:3] if next_skip >= 0 else size)
        return x

    def _embedded_beside(
        self, pooled: Float[Array, "B P"], numbers: Float[Array, "B N"], dtype
    ) -> Float[Array, "B D"]:
        config, (b, n) = self.config, numbers.shape
        dim, how = config.addition_time_embed_dim, (config.flip_sin_to_cos, config.freq_shift)
        sizes = sinusoidal_embedding(numbers.reshape(-1), dim, flip_sin_to_cos=how[0], freq_shift=how[1])
        return self.add_embedding(jnp.concatenate([pooled, sizes.reshape(b, n * dim)], -1).astype(dtype))

    def _embedded(self, guidance: Float[Array, " B"] | None, dtype) -> Float[Array, "B E"] | None:
        """As in Luo et al. 2023 (LCM)."""
        if guidance is None:
            return None
        dim = self.config.time_cond_proj_dim
        found = sinusoidal_embedding(1000 * guidance, dim, flip_sin_to_cos=False, freq_shift=1)
        return found.astype(dtype)
