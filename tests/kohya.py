"""LoRAs under the names that kohya's scripts give."""

import numpy as np

KINDS = {"unet": "lora_unet", "text_encoder": "lora_te"}
SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}


def as_kohya(tensors: dict[str, np.ndarray], alpha: float) -> dict[str, np.ndarray]:
    """The tensors of a file of diffusers', with an alpha beside each layer."""
    found = {}
    for key, array in tensors.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        kind, _, name = layer.partition(".")
        flat = f"{KINDS[kind]}_{name.replace('.', '_')}"
        found[f"{flat}.{SIDES[side]}.weight"] = array
        found[f"{flat}.alpha"] = np.float32(alpha)
    return found
