"""The models that stand in folders (unet/, vae/, text_encoder/, a CLIP): whose they are, their classes."""

from typing import Any, NamedTuple

from flax import nnx

from engine.models.autoencoder import AutoencoderConfig, AutoencoderKL
from engine.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from engine.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from engine.models.clip_vision import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from engine.models.controlnet import ControlNetConfig, ControlNetModel
from engine.models.controlnet_union import ControlNetUnionConfig, ControlNetUnionModel
from engine.models.safety_checker import SafetyCheckerConfig, StableDiffusionSafetyChecker
from engine.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from engine.models.unet import UNet2DConditionModel, UNetConfig

DIFFUSERS_VERSION = "0.35.0"  # whose layout is written


class Kind(NamedTuple):
    """What stands in a component's folder: who wrote it, its class and config, the name of its weights."""

    library: str
    class_name: str
    config: type
    module: type[nnx.Module]
    stem: str
    others: tuple["Kind", ...] = ()  # classes that may stand there in its place

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of all classes that may stand there, the usual one first."""
        return self.class_name, *(other.class_name for other in self.others)

    def named(self, class_name: str) -> "Kind":
        """The class of that name, one of `class_names`."""
        return next(kind for kind in (self, *self.others) if kind.class_name == class_name)

    def of(self, config: Any) -> "Kind":
        """The class whose config this is."""
        return next(kind for kind in (self, *self.others) if type(config) is kind.config)

    def notes(self) -> dict[str, Any]:
        """What config.json says of its class, as the library that reads it expects."""
        if self.library == "diffusers":
            return {"_class_name": self.class_name, "_diffusers_version": DIFFUSERS_VERSION}
        return {"architectures": [self.class_name], "model_type": MODEL_TYPES[self.class_name]}


MODEL_TYPES = {  # as transformers calls them
    "CLIPTextModel": "clip_text_model",
    "CLIPTextModelWithProjection": "clip_text_model",
    "CLIPModel": "clip",
    "StableDiffusionSafetyChecker": "clip",
    "SafetyChecker": "clip",
    "CLIPVisionModelWithProjection": "clip_vision_model",
}
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_ADAPTER = Kind("diffusers", "T2IAdapter", T2IAdapterConfig, T2IAdapter, _DIFFUSERS_STEM)
_UNION = Kind(
    "diffusers", "ControlNetUnionModel", ControlNetUnionConfig, ControlNetUnionModel, _DIFFUSERS_STEM
)
_TINY = Kind("diffusers", "AutoencoderTiny", AutoencoderTinyConfig, AutoencoderTiny, _DIFFUSERS_STEM)
KINDS = {
    "unet": Kind("diffusers", "UNet2DConditionModel", UNetConfig, UNet2DConditionModel, _DIFFUSERS_STEM),
    "vae": Kind("diffusers", "AutoencoderKL", AutoencoderConfig, AutoencoderKL, _DIFFUSERS_STEM, (_TINY,)),
    "text_encoder": Kind("transformers", "CLIPTextModel", CLIPTextConfig, CLIPTextModel, "model"),
}


def _checker(name: str, others: tuple[Kind, ...] = ()) -> Kind:
    """The same under its name of today, and under that of the first."""
    return Kind("transformers", name, SafetyCheckerConfig, StableDiffusionSafetyChecker, "model", others)


_PROJECTED, _SEEN = "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"
# Beside the parts of any folder that draws: that of SDXL, and what is a folder by itself.
KNOWN = KINDS | {
    "text_encoder_2": Kind("transformers", _PROJECTED, CLIPTextConfig, CLIPTextModelWithProjection, "model"),
    "clip": Kind("transformers", "CLIPModel", CLIPConfig, CLIPModel, "model"),
    "image_encoder": Kind("transformers", _SEEN, CLIPVisionConfig, CLIPVisionModelWithProjection, "model"),
    "safety_checker": _checker("StableDiffusionSafetyChecker", (_checker("SafetyChecker"),)),
    "controlnet": Kind(
        "diffusers", "ControlNetModel", ControlNetConfig, ControlNetModel, _DIFFUSERS_STEM, (_ADAPTER, _UNION)
    ),
}
