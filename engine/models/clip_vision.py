"""The whole of CLIP (Radford et al. 2021): unit vectors of pictures and texts, near where they agree.

The image encoder is a vision transformer (Dosovitskiy et al. 2021) of the text encoder's layers, in which
every patch looks at every other. The vector of a picture is that of a class token before the patches.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engine.config import from_json
from engine.models.attention import layer_norm
from engine.models.clip import (
    FIXED_OF_ENCODERS,
    UNREAD,
    CLIPEncoder,
    CLIPTextConfig,
    CLIPTextTransformer,
    check_encoder,
)
from engine.models.layers import check_positive, linear
from engine.types import UserError

FIXED = {"architectures": (None, ["CLIPModel"]), "model_type": ("clip",), **FIXED_OF_ENCODERS}
VISION_FIXED = {
    "architectures": (None, ["CLIPVisionModel"], ["CLIPVisionModelWithProjection"]),
    "model_type": ("clip_vision_model",),
    "num_channels": (3,),
    **FIXED_OF_ENCODERS,
}
# Older folders repeat in text_config and vision_config what transformers knows of every model. This part of
# it concerns the writing of texts and the training, which no encoder does.
GENERATION = (
    *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length"),
    *("min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_scores", "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
    *("sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript"),
    *("typical_p", "use_bfloat16"),
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in vision_config, too, where they mean nothing


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The vision_config of a CLIP, with the names and defaults of transformers. Sizes in pixels."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512  # of models of the image encoder alone; CLIPConfig has one of its own
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "CLIPVisionConfig":
        """Reads the object; raises UserError for what the engine does not know."""
        known = {k: v for k, v in options.items() if k not in (*UNREAD, *TOKENS)}
        return from_json(cls, known, where, VISION_FIXED)

    def __post_init__(self):
        check_encoder(self)
        check_positive(self, "image_size", "patch_size")
        if self.patch_size > self.image_size:
            raise UserError(f"patch_size={self.patch_size}: write at most image_size={self.image_size}")

    @property
    def tokens(self) -> int:
        """The class token and the patches. Pixels beyond the last whole patch are not seen."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The config.json of a CLIP, with the names and defaults of transformers."""

    text_config: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "CLIPConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        return cls._read(options, where, FIXED)

    @classmethod
    def _read(cls, options: Mapping[str, Any], where: str, fixed: Mapping[str, tuple]) -> Any:
        given = {k: v for k, v in options.items() if k not in (*UNREAD, *GENERATION)}
        for name, part in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
            whole, older = given.pop(name, None), given.pop(f"{name}_dict", None)
            # transformers fills what the older spelling leaves out with defaults, not from the newer one.
            inner = (whole or {}) if older is None else older
            if not isinstance(inner, dict):
                raise UserError(f"{where}: {name}={inner!r}: write an object of options")
            inner = {k: v for k, v in inner.items() if k not in GENERATION}
            given[name] = part.from_json(inner, f"{where}: {name}")
        return from_json(cls, given, where, fixed)

    def __post_init__(self):
        check_positive(self, "projection_dim")


class VisionOutput(NamedTuple):
    """What the image encoder says of a picture."""

    last_hidden_state: Float[Array, "B T D"]  # the class token, then the patches, row by row
    pooled: Float[Array, "B D"]  # the class token after the final norm
    hidden_states: tuple[Float[Array, "B T D"], ...]  # the embeddings after their norm, then each layer


class CLIPVisionEmbeddings(nnx.Module):
    """The class token and the patches, each with its place."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(width**-0.5 * rngs.params.normal((width,)))
        self.patch_embedding = nnx.Conv(
            3, width, (patch, patch), strides=patch, padding="VALID", use_bias=False, rngs=rngs
        )
        self.position_embedding = nnx.Embed(config.tokens, width, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        patches = self.patch_embedding(pixels)
        B, _, _, D = patches.shape
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (B, 1, D))
        tokens = jnp.concatenate([first, patches.reshape(B, -1, D)], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPVisionTransformer(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        self.embeddings = CLIPVisionEmbeddings(config, rngs)
        # The checkpoints spell it so.
        self.pre_layrnorm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.encoder = CLIPEncoder(config, rngs, causal=False)
        self.post_layernorm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> VisionOutput:
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return VisionOutput(states[-1], self.post_layernorm(states[-1][:, 0]), states)


class CLIPModel(nnx.Module):
    """Both encoders, and the way from each into the space that they share; attributes are checkpoint keys."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        text, vision, shared = config.text_config, config.vision_config, config.projection_dim
        self.text_model = CLIPTextTransformer(text, rngs)
        self.vision_model = CLIPVisionTransformer(vision, rngs)
        self.text_projection = linear(text.hidden_size, shared, use_bias=False, rngs=rngs)
        self.visual_projection = linear(vision.hidden_size, shared, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init_value))

    def text_features(self, ids: Int[Array, "B L"]) -> Float[Array, "B P"]:
        """Unit vectors, float32, of texts of up to max_position_embeddings ids."""
        return unit(self.text_projection(self.text_model(ids).pooled))

    def image_features(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        """Unit vectors, float32, of pictures of image_size x image_size, normalized as in the training."""
        return unit(self.visual_projection(self.vision_model(pixels).pooled))

    def __call__(self, ids: Int[Array, "A L"], pixels: Float[Array, "B H W 3"]) -> Float[Array, "B A"]:
        """The logits: exp(logit_scale) cos, of each picture with each text."""
        scale = jnp.exp(self.logit_scale[...].astype(jnp.float32))
        return scale * self.image_features(pixels) @ self.text_features(ids).T


class CLIPVisionModelWithProjection(nnx.Module):
    """The image encoder alone, with the way into the space that it shares with the texts."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = CLIPVisionTransformer(config, rngs)
        self.visual_projection = linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        """The vectors of pictures, of any length; the pixels as CLIPModel takes them."""
        return self.visual_projection(self.vision_model(pixels).pooled)

    def patches(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """What is said of the class token and of each patch before the last layer."""
        return self.vision_model(pixels).hidden_states[-2]


def unit(x: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Vectors of length one, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
