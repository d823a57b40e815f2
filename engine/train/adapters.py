"""Training of LoRAs: a loss over the weights of a model becomes one over a LoRA; the weights stay."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import traverse_util
from jax.typing import DTypeLike

from engine.config import LoraConfig
from engine.train.step import Loss, cast
from engine.weights.component import Component
from engine.weights.lora import XL_KINDS, Lora, fresh, layer_name, merged

NOTHING: Mapping[str, str] = MappingProxyType({})
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def begin(parts: Mapping[str, Component], config: LoraConfig, seed: int) -> Lora:
    """The LoRA that a training starts with: its layers are what is trained.

    Args:
      parts: of a model; its text encoders are changed where config.text_encoder says so.

    Raises:
      UserError: the config is wrong, or a target matches no layer.
    """
    config.validate()
    kinds = [kind for kind in XL_KINDS if kind in parts] if config.text_encoder else ["unet"]
    targets = (*config.targets, *(TEXT_TARGETS if config.text_encoder else ()))
    key = jax.random.key(seed, impl="threefry2x32")
    return fresh(key, {kind: parts[kind].config for kind in kinds}, targets, config.rank, config.alpha)


def lora_loss(loss: Loss, alphas: Mapping[str, float], beside: Mapping[str, str] = NOTHING) -> Loss:
    """`loss` of the U-Net's params, as `objectives.text_to_image_loss`, seen as one of a LoRA's layers.

    params: the layers; frozen: what `loss` takes and "unet", its params. Text encoders in it are merged, too.
    The model is called with merged weights, so that any model and any loss goes. To be put `around` the cast
    to a type of half precision (see `train_step`): in it, a small change is lost beside the weight.

    beside: other names, under which `loss` takes parts as they are without the LoRA.
    """

    def over_layers(layers, frozen, batch, key):
        weights = {kind: frozen[kind] for kind in XL_KINDS if kind in frozen}
        rest = {**frozen, **merged(weights, Lora(layers, alphas))}
        rest |= {name: frozen[kind] for name, kind in beside.items()}
        return loss(rest.pop("unet"), rest, batch, key)

    return over_layers


def kept(frozen: Mapping[str, Any], lora: Lora, dtype: DTypeLike) -> dict[str, Any]:
    """What stays, in the type that is computed in; in float32 the kernels that the LoRA changes."""

    def one(kind: str, params: Any) -> Any:
        if kind not in XL_KINDS:
            return cast(params, dtype)
        flat = traverse_util.flatten_dict(params)
        for path in flat:
            if path[-1] != "kernel" or layer_name(kind, path) not in lora.layers:
                flat[path] = cast(flat[path], dtype)
        return traverse_util.unflatten_dict(flat)

    return {kind: one(kind, params) for kind, params in frozen.items()}
