"""Training of LoRAs: a loss over the weights of a model becomes one over a LoRA; the weights stay."""

from collections.abc import Mapping

import jax

from engine.config import LoraConfig
from engine.train.step import Loss
from engine.weights.component import Component
from engine.weights.lora import KINDS, Lora, fresh, merged

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def begin(parts: Mapping[str, Component], config: LoraConfig, seed: int) -> Lora:
    """The LoRA that a training starts with: its layers are what is trained.

    Args:
      parts: "unet", and "text_encoder" where config.text_encoder says so.

    Raises:
      UserError: the config is wrong, or a target matches no layer.
    """
    config.validate()
    kinds = KINDS if config.text_encoder else ("unet",)
    targets = (*config.targets, *(TEXT_TARGETS if config.text_encoder else ()))
    key = jax.random.key(seed, impl="threefry2x32")
    return fresh(key, {kind: parts[kind].config for kind in kinds}, targets, config.rank, config.alpha)


def lora_loss(loss: Loss, alphas: Mapping[str, float]) -> Loss:
    """`loss` of the U-Net's params, as `objectives.text_to_image_loss`, seen as one of a LoRA's layers.

    params: the layers; frozen: what `loss` takes and "unet", its params. "text_encoder" in it is merged, too.
    The model is called with merged weights, so that any model and any loss goes.
    """

    def over_layers(layers, frozen, batch, key):
        weights = {kind: frozen[kind] for kind in KINDS if kind in frozen}
        rest = {**frozen, **merged(weights, Lora(layers, alphas))}
        return loss(rest.pop("unet"), rest, batch, key)

    return over_layers
