"""A ControlNet for many kinds of pictures ("union", github.com/xinsir6/ControlNetPlus), and several at once.

It is told of each picture of which kind it is (edges, depth, poses, ...), by a token of the kind and by an
embedding beside that of the time. The token meets the mean of what the network makes of the picture, and says
channel by channel what is to be added to it.

The original lets the tokens of a batch attend to those of other pictures in the same place: its attention
takes the batch for the sequence. With one picture at a time, all in a batch say the same, and a token attends
to itself alone. So it does here, whatever else is drawn beside it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engine.config import from_json
from engine.models.attention import layer_norm
from engine.models.controlnet import FIXED, ControlNetConfig, ControlNetModel, Look
from engine.models.layers import TimestepEmbedding, activation, check_positive, linear
from engine.types import UserError


@dataclasses.dataclass(frozen=True)
class ControlNetUnionConfig(ControlNetConfig):
    """config.json of a ControlNet union, with the names and defaults of PyTorch diffusers."""

    conditioning_embedding_out_channels: tuple[int, ...] = (48, 96, 192, 384)
    num_control_type: int = 6  # kinds of pictures
    num_trans_channel: int = 320
    num_trans_head: int = 8
    num_trans_layer: int = 1
    num_proj_channel: int = 320

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "ControlNetUnionConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        return from_json(cls, options, where, FIXED)

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "num_control_type", "num_trans_head", "num_trans_layer")
        first = self.block_out_channels[0]
        for name in ("num_trans_channel", "num_proj_channel"):
            if (channels := getattr(self, name)) != first:
                raise UserError(
                    f"{name}={channels}: the first level has {first} channels, to which it is added"
                )
        if self.addition_time_embed_dim is None:
            raise UserError("addition_time_embed_dim=null: a union has one, by which it is told of kinds")


class SelfAttention(nnx.Module):
    """Of a token to itself alone: its own value. Queries and keys are in the file, and decide nothing."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.in_proj_weight = nnx.Param(init(rngs.params(), (3 * dim, dim)))  # in PyTorch's layout
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * dim))
        self.out_proj = linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        dim = x.shape[-1]
        value = x @ self.in_proj_weight[...][2 * dim :].T + self.in_proj_bias[...][2 * dim :]
        return self.out_proj(value)


class ResidualAttentionMlp(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.c_fc = linear(dim, 4 * dim, rngs=rngs)
        self.c_proj = linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return self.c_proj(activation("quick_gelu", "")(self.c_fc(x)))


class ResidualAttentionBlock(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.attn = SelfAttention(dim, rngs)
        self.ln_1 = layer_norm(dim, rngs)
        self.mlp = ResidualAttentionMlp(dim, rngs)
        self.ln_2 = layer_norm(dim, rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ControlNetUnionModel(ControlNetModel):
    """The network; attributes are the keys of its checkpoints, misspelt ones included."""

    def __init__(self, config: ControlNetUnionConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        channels, kinds = config.num_trans_channel, config.num_control_type
        normal = nnx.initializers.normal(channels**0.5)
        self.task_embedding = nnx.Param(normal(rngs.params(), (kinds, channels)))
        self.transformer_layes = nnx.List(
            [ResidualAttentionBlock(channels, rngs) for _ in range(config.num_trans_layer)]
        )
        zeros = nnx.initializers.zeros_init()
        self.spatial_ch_projs = linear(channels, config.num_proj_channel, kernel_init=zeros, rngs=rngs)
        width, time_dim = config.addition_time_embed_dim * kinds, 4 * config.block_out_channels[0]
        self.control_add_embedding = TimestepEmbedding(width, time_dim, self.act, rngs=rngs)

    def look_at(
        self, pictures: Sequence[Float[Array, "B H W 3"]], kinds: Sequence[int], scales: Sequence[float]
    ) -> Look:
        """What the network makes of pictures that it sees at once, each of a kind, and scaled.

        Of one alone the scale is left to `near` and `deep`.
        """
        if len(pictures) == 1:
            scales = [1.0]
        seen = sum(map(self._told, pictures, kinds, scales))
        told = jnp.zeros(self.config.num_control_type).at[jnp.array(kinds)].set(1)
        told = self.sines(told, self.config.addition_time_embed_dim).reshape(1, -1)
        time = self.control_add_embedding(told.astype(self.dtype))
        return Look(seen, jnp.repeat(time, len(seen), axis=0))

    def _told(self, picture: Float[Array, "B H W 3"], kind: int, scale: float) -> Float[Array, "B h w C"]:
        """A picture of which the network knows what it is."""
        scale = jnp.asarray(scale, self.dtype)
        seen = scale * self._embedded(picture)
        token = scale * self.task_embedding[...][kind] + seen.mean((1, 2))
        for layer in self.transformer_layes:
            token = layer(token)
        return seen + scale * self.spatial_ch_projs(token)[:, None, None]
