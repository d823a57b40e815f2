"""The safety checker of Stable Diffusion 1: whether a picture is near one of the concepts that it knows.

CLIP's image encoder says what is seen, and its angle to each of 17 concepts is held against a threshold; near
one of 3 others, which want special care, the thresholds are 0.01 lower (Rando et al. 2022, "Red-Teaming the
Stable Diffusion Safety Filter", figure 2).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from engine.models.clip_vision import FIXED, CLIPConfig, CLIPVisionTransformer, unit
from engine.models.layers import linear

CONCEPTS, SPECIAL = 17, 3
CARE = 0.01  # by which thresholds are lower
DIGITS = 1000  # scores are rounded to so many parts of one


@dataclasses.dataclass(frozen=True)
class SafetyCheckerConfig(CLIPConfig):
    """safety_checker/config.json: that of a CLIP, of which the image encoder is used."""

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "SafetyCheckerConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        names = (None, ["StableDiffusionSafetyChecker"], ["SafetyChecker"])
        return cls._read(options, where, FIXED | {"architectures": names})


class _Vision(nnx.Module):
    """CLIPVisionModel of transformers, which has the encoder under a name of its own."""

    def __init__(self, config: SafetyCheckerConfig, rngs: nnx.Rngs):
        self.vision_model = CLIPVisionTransformer(config.vision_config, rngs)


class StableDiffusionSafetyChecker(nnx.Module):
    """The whole; attributes are the keys of its checkpoints."""

    def __init__(self, config: SafetyCheckerConfig, rngs: nnx.Rngs):
        width, shared = config.vision_config.hidden_size, config.projection_dim
        self.vision_model = _Vision(config, rngs)
        self.visual_projection = linear(width, shared, use_bias=False, rngs=rngs)
        self.concept_embeds = nnx.Param(jnp.ones((CONCEPTS, shared)))
        self.special_care_embeds = nnx.Param(jnp.ones((SPECIAL, shared)))
        self.concept_embeds_weights = nnx.Param(jnp.ones(CONCEPTS))  # thresholds
        self.special_care_embeds_weights = nnx.Param(jnp.ones(SPECIAL))

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Bool[Array, " B"]:
        """Which pictures are near none of the concepts; the pixels as CLIPModel takes them."""
        seen = unit(self.visual_projection(self.vision_model.vision_model(pixels).pooled))
        special = _scores(seen, self.special_care_embeds, self.special_care_embeds_weights, 0.0)
        care = jnp.where((special > 0).any(-1, keepdims=True), CARE, 0.0)
        scores = _scores(seen, self.concept_embeds, self.concept_embeds_weights, care)
        return ~(scores > 0).any(-1)


def _scores(
    seen: Float[Array, "B P"], concepts: nnx.Param, thresholds: nnx.Param, care: float | Float[Array, "B 1"]
) -> Float[Array, "B N"]:
    """By how much the cosine of each concept is above its threshold, as in the original to three digits."""
    near = jnp.matmul(seen, unit(concepts[...]).T, precision=jax.lax.Precision.HIGHEST)
    return jnp.round((near - thresholds[...].astype(jnp.float32) + care) * DIGITS) / DIGITS
