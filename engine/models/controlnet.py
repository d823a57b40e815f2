"""A ControlNet (Zhang et al. 2023): a copy of a U-Net's way down that sees a picture, and adds to it.

The picture (edges, depth, poses, ...) says where things are. What the copy makes of it, of the noisy latent
and of the words goes through convolutions that were zero when its training began, and is added to the skips
and to the middle of the U-Net, which stays as it was.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engine.config import from_json
from engine.models.attention import Read
from engine.models.layers import check_positive, conv
from engine.models.unet_config import ENCODER_FIXED, EncoderConfig
from engine.models.unet_encoder import UNetEncoder
from engine.types import UserError

FIXED = ENCODER_FIXED | {"global_pool_conditions": (False,)}
ORDERS = ("rgb", "bgr")


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """config.json of a ControlNet, with the names and defaults of PyTorch diffusers."""

    conditioning_channels: int = 3
    controlnet_conditioning_channel_order: str = "rgb"
    # Of the convolutions that bring the picture to the size of the latents: each but the first halves it.
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    @property
    def scale(self) -> int:
        """Pixels a side of the picture to a latent."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "ControlNetConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        return from_json(cls, options, where, FIXED)

    def __post_init__(self):
        super().__post_init__()
        self._check_known("controlnet_conditioning_channel_order", ORDERS)
        check_positive(self, "conditioning_embedding_out_channels")
        if self.conditioning_channels != 3:
            raise UserError(f"conditioning_channels={self.conditioning_channels}: pictures have 3")
        if self.mid_block_type is None:
            raise UserError("mid_block_type=null: a ControlNet has a middle")


class Control(NamedTuple):
    """What is added to a U-Net. At its full size at once; the rest by a call, as it may not be wanted."""

    full_size: list[Float[Array, "B H W C"]]  # to conv_in's output and the skips of the first level
    # to all other skips, and to the middle; None: nothing, and nothing at full size
    deep: Callable[[], tuple[list[Array], Array]] | None
    features: tuple[Float[Array, "B _ _ _"], ...] = ()  # on the way down, see engine.models.t2i_adapter

    def feature(self, level: int) -> Float[Array, "B _ _ _"] | None:
        """What is added at the end of a level, or behind the last to the middle."""
        return self.features[level] if level < len(self.features) else None


class Look(NamedTuple):
    """What a ControlNet makes of its pictures alone."""

    picture: Float[Array, "B h w C"]  # at the size of the latents
    time: Float[Array, "B E"] | None = None  # what it adds to the embedding of the time


Scale = Float[Array, ""] | Float[Array, " B"] | float
State = tuple[Float[Array, "B H W F"], Float[Array, "B E"]]  # the first level's output, and the time


class ControlNetConditioningEmbedding(nnx.Module):
    """The picture, at the size of the latents and in as many channels as the first level has."""

    def __init__(self, config: ControlNetConfig, rngs: nnx.Rngs):
        first, *_ = widths = config.conditioning_embedding_out_channels
        self.conv_in = conv(config.conditioning_channels, first, 3, rngs=rngs)
        blocks = []
        for narrow, wide in itertools.pairwise(widths):
            blocks.append(conv(narrow, narrow, 3, rngs=rngs))
            blocks.append(conv(narrow, wide, 3, stride=2, rngs=rngs))
        self.blocks = nnx.List(blocks)
        zeros = nnx.initializers.zeros_init()
        self.conv_out = conv(widths[-1], config.block_out_channels[0], 3, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        for layer in (self.conv_in, *self.blocks):
            x = jax.nn.silu(layer(x))
        return self.conv_out(x)


class ControlNetModel(UNetEncoder):
    """The network; attributes are the keys of its checkpoints.

    It is called in two parts, as the deep one may not be wanted (`engine.diffusion.caching`).
    """

    def __init__(self, config: ControlNetConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(config, rngs)

        def from_zero(channels: int) -> nnx.Conv:
            return conv(channels, channels, 1, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

        self.controlnet_down_blocks = nnx.List([from_zero(channels) for channels in config.skip_channels])
        self.controlnet_mid_block = from_zero(config.block_out_channels[-1])
        self._name_places()

    def look(self, picture: Float[Array, "B H W 3"]) -> Look:
        """What the network makes of a picture, 0 to 1, alone: once for many calls."""
        return Look(self._embedded(picture))

    def _embedded(self, picture: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture[..., ::-1]
        return self.controlnet_cond_embedding(picture.astype(self.dtype))

    def near(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        context: Float[Array, "B L D"] | Read,
        seen: Look,
        scale: Scale = 1.0,
        added: tuple[Float[Array, "B P"], Float[Array, "B N"]] | None = None,
    ) -> tuple[list[Float[Array, "B H W F"]], State]:
        """What is to be added, at full size, to the U-Net that is called with the same; what `deep` needs.

        Args:
          x, t, context, added: as UNet2DConditionModel takes them; of x the latent alone.
          seen: the picture, by `look`.
          scale: what is added is multiplied by it; one for all or one for each.
        """
        x, context, seen = jax.tree.map(lambda array: array.astype(self.dtype), (x, context, seen))
        temb = self.embedded_time(t, added)
        if seen.time is not None:
            temb = temb + seen.time
        x = first = self.conv_in(x) + seen.picture
        x, skips = self.down_blocks[0].at_full_size(x, temb, context)
        return self._scaled(self.controlnet_down_blocks[: 1 + len(skips)], [first, *skips], scale), (x, temb)

    def deep(
        self, state: State, context: Float[Array, "B L D"] | Read, scale: Scale = 1.0
    ) -> tuple[list[Float[Array, "B _ _ _"]], Float[Array, "B h w G"]]:
        """What is to be added to all other skips, and to the middle; the arguments as for `near`."""
        x, temb = state
        context = jax.tree.map(lambda array: array.astype(self.dtype), context)
        x, skips = self.down_blocks[0].down(x)
        for block in self.down_blocks[1:]:
            x, more = block(x, temb, context)
            skips += more
        x = self.mid_block(x, temb, context)
        layers = self.controlnet_down_blocks[len(self.controlnet_down_blocks) - len(skips) :]
        return self._scaled(layers, skips, scale), self._scaled([self.controlnet_mid_block], [x], scale)[0]

    def _scaled(self, layers: Sequence[nnx.Conv], arrays: Sequence[Array], scale: Scale) -> list[Array]:
        scale = jnp.asarray(scale, self.dtype)
        scale = scale[:, None, None, None] if scale.ndim else scale
        return [layer(array) * scale for layer, array in zip(layers, arrays, strict=True)]
