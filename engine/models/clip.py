"""CLIP's text encoder: a causal transformer whose last (or an earlier) layer steers the U-Net.

Its layers are those of CLIP's image encoder, too (engine.models.clip_vision).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engine.config import from_json
from engine.models.attention import attend, layer_norm
from engine.models.layers import activation, check_positive, linear, spread
from engine.types import UserError

# A layer adds half as much as it is given.
BRANCH_INIT = spread(0.25)

# What the arithmetic of an encoder depends on, in the config of any model.
FIXED_OF_ENCODERS = {
    "attention_dropout": (0.0,),
    "dropout": (0.0,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
}
FIXED = {
    "architectures": (None, ["CLIPTextModel"], ["CLIPTextModelWithProjection"]),
    "model_type": ("clip_text_model",),
    **FIXED_OF_ENCODERS,
}
LARGEST_ID = 2  # as an eos_token_id: text ends at the largest id
# The keys of any config of transformers that the arithmetic of an encoder never reads: who wrote it and in
# which dtype, how training began, the names of classes, and which outputs a call returns.
UNREAD = (
    *("use_cache", "gradient_checkpointing", "tie_word_embeddings", "max_length"),
    *("transformers_version", "torch_dtype", "dtype", "initializer_factor", "initializer_range"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
)


@runtime_checkable
class EncoderConfig(Protocol):
    """What the layers of an encoder ask of its config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


def check_encoder(config: EncoderConfig) -> None:
    """Raises UserError for an encoder that cannot be built."""
    activation(config.hidden_act, "hidden_act")
    check_positive(config, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if config.hidden_size % config.num_attention_heads:
        heads, width = config.num_attention_heads, config.hidden_size
        raise UserError(f"num_attention_heads={heads} does not divide hidden_size={width}")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """text_encoder/config.json, with the names and defaults of transformers."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "CLIPTextConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        return from_json(cls, {k: v for k, v in options.items() if k not in UNREAD}, where, FIXED)

    def __post_init__(self):
        check_encoder(self)
        check_positive(self, "vocab_size", "max_position_embeddings")


class TextOutput(NamedTuple):
    """What the encoder says of a prompt."""

    last_hidden_state: Float[Array, "B L D"]  # after the final norm
    pooled: Float[Array, "B _"]  # the same, at the end of the text; projected, where the model does that
    hidden_states: tuple[Float[Array, "B L D"], ...]  # the embeddings, then each layer, before the final norm


class CLIPTextEmbeddings(nnx.Module):
    """Words and places.

    Fresh words are far apart. From CLIP's own start (a deviation of 0.02) Adam's steps move a word by its
    whole length within dozens of steps.
    """

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.3),
            rngs=rngs,
        )

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CLIPAttention(nnx.Module):
    """causal: each token looks at itself and at those before it, and at no other."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, causal: bool = True):
        width = config.hidden_size
        self.q_proj = linear(width, width, rngs=rngs)
        self.k_proj = linear(width, width, rngs=rngs)
        self.v_proj = linear(width, width, rngs=rngs)
        self.out_proj = linear(width, width, kernel_init=BRANCH_INIT, rngs=rngs)
        self.heads = config.num_attention_heads
        self.causal = causal

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        B, L, D = x.shape
        q, k, v = (p(x).reshape(B, L, self.heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        mask = jnp.tril(jnp.ones((L, L), bool)) if self.causal else None
        return self.out_proj(attend(q, k, v, mask=mask).reshape(B, L, D))


class CLIPMLP(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.fc1 = linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, kernel_init=BRANCH_INIT, rngs=rngs)
        self.act = activation(config.hidden_act, "hidden_act")

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, causal: bool = True):
        self.layer_norm1 = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.self_attn = CLIPAttention(config, rngs, causal)
        self.layer_norm2 = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.mlp = CLIPMLP(config, rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, causal: bool = True):
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([CLIPEncoderLayer(config, rngs, causal) for _ in layers])

    def __call__(self, x: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class CLIPTextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.embeddings = CLIPTextEmbeddings(config, rngs)
        self.encoder = CLIPEncoder(config, rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.eos_token_id = config.eos_token_id

    def __call__(self, ids: Int[Array, "B L"]) -> TextOutput:
        states = self.encoder(self.embeddings(ids))
        last = self.final_layer_norm(states[-1])
        # Configs written before transformers 4.31 say 2 and mean the largest id, which was CLIP's end token.
        ends = ids if self.eos_token_id == LARGEST_ID else (ids == self.eos_token_id).astype(jnp.int32)
        pooled = jnp.take_along_axis(last, ends.argmax(-1)[:, None, None], axis=1)[:, 0]
        return TextOutput(last, pooled, states)


class CLIPTextModel(nnx.Module):
    """The text half of CLIP (Radford et al. 2021); attributes are the keys of its checkpoints."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> TextOutput:
        """ids: (B, L), L up to max_position_embeddings."""
        return self.text_model(ids)

    def context(self, ids: Int[Array, "B L"], clip_skip: int = 0) -> Float[Array, "B L D"]:
        """What the U-Net attends to: the last layer, or `clip_skip` layers before it, then the final norm."""
        output = self.text_model(ids)
        if clip_skip == 0:
            return output.last_hidden_state
        return self.text_model.final_layer_norm(output.hidden_states[-1 - clip_skip])


class CLIPTextModelWithProjection(nnx.Module):
    """The same, with the projection that makes texts comparable to pictures; the second encoder of SDXL."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, rngs)
        self.text_projection = linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> TextOutput:
        output = self.text_model(ids)
        return output._replace(pooled=self.text_projection(output.pooled))
