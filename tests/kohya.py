"""LoRAs under the names that kohya's scripts give."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

KINDS = {"unet": "lora_unet", "text_encoder": "lora_te"}
XL_KINDS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}


def as_kohya(
    tensors: dict[str, np.ndarray],
    alpha: float,
    kinds: Mapping[str, str] = KINDS,
    blocks: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """The tensors of a file of diffusers', with an alpha beside each layer.

    Args:
      kinds: KINDS or XL_KINDS.
      blocks: other names for layers of the U-Net.
    """
    found = {}
    for key, array in tensors.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        kind, _, name = layer.partition(".")
        name = blocks.get(name, name) if kind == "unet" else name
        flat = f"{kinds[kind]}_{name.replace('.', '_')}"
        found[f"{flat}.{SIDES[side]}.weight"] = np.ascontiguousarray(array)
        found[f"{flat}.alpha"] = np.array(alpha, np.float32)
    return found
