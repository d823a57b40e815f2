"""The U-Net of Stable Diffusion: it sees a noisy latent, the time and the words, and says what is noise."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from engine.models.attention import Read
from engine.models.controlnet import Control
from engine.models.layers import GroupNorm, conv, sinusoidal_embedding
from engine.models.unet_blocks import UpBlock2D
from engine.models.unet_config import UNetConfig
from engine.models.unet_encoder import UNetEncoder

NO_CONTROL = Control([], None)
Deep = Float[Array, "B H W K"]  # what the lower levels make of x, at its size


class UNet2DConditionModel(UNetEncoder):
    """F(x, t, context), the network of Rombach et al. 2022; attributes are the keys of its checkpoints."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs, config.time_cond_proj_dim)
        channels = config.block_out_channels
        self.up_blocks = self._way_up(self._resnet(rngs), rngs)
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, channels[0], epsilon=config.norm_eps, rngs=rngs
        )
        # Alone of all at zero. With every residual branch there too, as in Dhariwal & Nichol 2021
        # (zero_module), the words took twice as long to reach the picture.
        zeros = nnx.initializers.zeros_init()
        self.conv_out = conv(channels[0], config.out_channels, 3, kernel_init=zeros, rngs=rngs)
        self._name_places()

    def _way_up(self, resnet, rngs):
        config = self.config
        blocks, width, skip_channels = [], config.block_out_channels[-1], config.skip_channels
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

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        context: Float[Array, "B L D"] | Read,
        guidance: Float[Array, " B"] | None = None,
        added: tuple[Float[Array, "B P"], Float[Array, "B N"]] | None = None,
        recall: Callable[[Callable[[], Deep]], Deep] | None = None,
        control: Control | None = None,
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
          control: what ControlNets and T2I-Adapters add.
        """
        x, context = jax.tree.map(lambda array: array.astype(self.dtype), (x, context))
        if self.config.center_input_sample:
            x = 2 * x - 1
        temb = self.embedded_time(t, added, self._embedded(guidance))

        x = first = self.conv_in(x)
        control = control or NO_CONTROL
        x, skips = self.down_blocks[0].at_full_size(x, temb, context, control.feature(0))
        compute = partial(self._deep, x, temb, context, control)
        x = recall(compute) if recall else compute()
        skips = [first, *skips]
        if control.deep is not None:
            skips = [skip + more for skip, more in zip(skips, control.full_size, strict=True)]
        x = self.up_blocks[-1](x, skips, temb, context, None)
        return self.conv_out(self.act(self.conv_norm_out(x)))

    def _deep(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "B D"], context: Any, control: Control
    ) -> Deep:
        """All but the blocks of the full size, first and last: what the last one takes up."""
        size = x.shape[1:3]
        x, skips = self.down_blocks[0].down(x, control.feature(0))
        for level, block in enumerate(self.down_blocks[1:], 1):
            x, block_skips = block(x, temb, context, control.feature(level))
            skips += block_skips
        if self.config.mid_block_type is not None:
            x = self.mid_block(x, temb, context)
            if (feature := control.feature(len(self.down_blocks))) is not None:
                x = x + feature
        if control.deep is not None:
            more, middle = control.deep()
            skips, x = [skip + each for skip, each in zip(skips, more, strict=True)], x + middle
        for block in self.up_blocks[:-1]:
            # An odd size was rounded on the way down: go back to the size of the next skip.
            next_skip = len(skips) - len(block.resnets) - 1
            x = block(x, skips, temb, context, skips[next_skip].shape[1:3] if next_skip >= 0 else size)
        return x

    def _embedded(self, guidance: Float[Array, " B"] | None) -> Float[Array, "B E"] | None:
        """As in Luo et al. 2023 (LCM)."""
        if guidance is None:
            return None
        dim = self.config.time_cond_proj_dim
        found = sinusoidal_embedding(1000 * guidance, dim, flip_sin_to_cos=False, freq_shift=1)
        return found.astype(self.dtype)
