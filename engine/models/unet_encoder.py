"""What a U-Net and a ControlNet have in common: the time, the words, the way down and the middle."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engine.models.attention import Attention, BasicTransformerBlock, Read, Transformer2DModel
from engine.models.layers import ResnetBlock2D, TimestepEmbedding, activation, conv, sinusoidal_embedding
from engine.models.unet_blocks import DownBlock2D, MidBlock2D
from engine.models.unet_config import EncoderConfig


class UNetEncoder(nnx.Module):
    """The networks of both kinds begin with these parts; attributes are the keys of their checkpoints."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, time_cond_proj_dim: int | None = None):
        """time_cond_proj_dim: see UNetConfig."""
        self.config = config
        channels = config.block_out_channels
        time_dim = 4 * channels[0]
        self.act = activation(config.act_fn, "act_fn")
        self.conv_in = conv(config.in_channels, channels[0], 3, rngs=rngs)
        self.time_embedding = TimestepEmbedding(
            channels[0], time_dim, self.act, time_cond_proj_dim, rngs=rngs
        )
        if config.addition_embed_type:
            width = config.projection_class_embeddings_input_dim
            self.add_embedding = TimestepEmbedding(width, time_dim, self.act, rngs=rngs)
        resnet = self._resnet(rngs)
        self.down_blocks = self._way_down(resnet, rngs)
        if config.mid_block_type is not None:
            attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
            self.mid_block = MidBlock2D(
                channels[-1],
                depth=config.depths(-1)[0],
                resnet=partial(resnet, output_scale_factor=config.mid_block_scale_factor),
                # the mid block always attends to itself as well
                transformer=self._transformer(-1, rngs, only_cross_attention=False) if attends else None,
            )

    def _resnet(self, rngs: nnx.Rngs):
        config = self.config
        return partial(
            ResnetBlock2D,
            temb_channels=4 * config.block_out_channels[0],
            groups=config.norm_num_groups,
            epsilon=config.norm_eps,
            act=self.act,
            time_scale_shift=config.resnet_time_scale_shift,
            rngs=rngs,
        )

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

    def _way_down(self, resnet, rngs: nnx.Rngs) -> nnx.List:
        config = self.config
        blocks, width = [], config.block_out_channels[0]
        for i, (kind, out) in enumerate(zip(config.down_block_types, config.block_out_channels, strict=True)):
            blocks.append(
                DownBlock2D(
                    width,
                    out,
                    depths=config.depths(i),
                    downsample=i < len(config.block_out_channels) - 1,
                    resnet=resnet,
                    transformer=self._block_transformer(kind, i, rngs),
                    padding=config.downsample_padding,
                    rngs=rngs,
                )
            )
            width = out
        return nnx.List(blocks)

    def _name_places(self) -> None:
        """Tells each layer that attends where it is; to be called when all are there."""
        for path, layer in nnx.iter_modules(self):
            if isinstance(layer, Attention):
                layer.place = ".".join(map(str, path))

    def read(self, context: Float[Array, "B L D"]) -> Read:
        """What the layers make of the words, which `__call__` takes in their place: once for many calls."""
        context, found = context.astype(self.dtype), {}
        for _, block in nnx.iter_modules(self):
            if isinstance(block, BasicTransformerBlock):
                found |= block.read(context)
        return found

    @property
    def dtype(self):
        """Of the params, in which it computes."""
        return self.conv_in.kernel[...].dtype

    def sines(self, t: Float[Array, " B"], dim: int) -> Float[Array, "B D"]:
        """`sinusoidal_embedding` as the config has it."""
        config = self.config
        how = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        return sinusoidal_embedding(t, dim, **how)

    def embedded_time(
        self,
        t: Float[Array, " B"],
        added: tuple[Float[Array, "B P"], Float[Array, "B N"]] | None,
        cond: Float[Array, "B E"] | None = None,
    ) -> Float[Array, "B D"]:
        """The time, and what is told beside it, as every residual block receives it.

        Args:
          added: the pooled words and numbers, see UNet2DConditionModel.
          cond: a second embedding, of width `time_cond_proj_dim`.
        """
        config = self.config
        temb = self.sines(t, config.block_out_channels[0])
        temb = self.time_embedding(temb.astype(self.dtype), cond)
        if not config.addition_embed_type:
            return temb
        pooled, numbers = added
        (b, n), dim = numbers.shape, config.addition_time_embed_dim
        sizes = self.sines(numbers.reshape(-1), dim).reshape(b, n * dim)
        return temb + self.add_embedding(jnp.concatenate([pooled, sizes], -1).astype(self.dtype))
