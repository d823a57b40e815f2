"""IP-Adapters for tiny models, with random weights, in the files of their originals; image encoders."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from engine.weights.component import save_component
from tests.tiny import component, random

ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "hidden_act": "gelu",
}
HEADS, DEPTH, HIDDEN, QUERIES = 2, 4, 20, 5  # of a "plus" one; diffusers knows of four layers alone


def tiny_encoder(path: str | os.PathLike, **options: Any) -> pathlib.Path:
    """Writes an image encoder; returns the path of its folder."""
    save_component(pathlib.Path(path), component("image_encoder", {**ENCODER, **options}, 3))
    return pathlib.Path(path)


def tiny_adapter(
    path: str | os.PathLike, widths: Mapping[int, int], context: int, way: str = "plain", seed: int = 0
) -> pathlib.Path:
    """Writes an IP-Adapter.

    Args:
      widths: channels of the layers that attend to words, by their number in the file.
      context: channels of the words.
    """
    shapes = {f"image_proj.{key}": shape for key, shape in PROJECTIONS[way](context).items()}
    for number, width in widths.items():
        shapes |= {f"ip_adapter.{number}.to_{name}_ip.weight": (width, context) for name in "kv"}
    save_file({key: tensor(key, shape, seed) for key, shape in shapes.items()}, path)
    return pathlib.Path(path)


def tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Such that activations keep their scale."""
    norm = len(shape) == 1 and key.endswith("weight")
    found = random("ip_adapter", (key, "scale" if norm else "kernel"), shape[::-1], seed)
    return np.ascontiguousarray(found.T) if len(shape) == 2 else found.reshape(shape)


def plain(context: int) -> dict[str, tuple[int, ...]]:
    rows = 4 * context
    return {"proj.weight": (rows, ENCODER["projection_dim"]), "proj.bias": (rows,)} | norm("norm", context)


def full(context: int) -> dict[str, tuple[int, ...]]:
    seen = ENCODER["hidden_size"]
    first = {"proj.0.weight": (seen, seen), "proj.0.bias": (seen,)}
    return first | {"proj.2.weight": (context, seen), "proj.2.bias": (context,)} | norm("proj.3", context)


def plus(context: int) -> dict[str, tuple[int, ...]]:
    inner, seen = HEADS * 64, ENCODER["hidden_size"]
    found = {
        "latents": (1, QUERIES, HIDDEN),
        "proj_in.weight": (HIDDEN, seen),
        "proj_in.bias": (HIDDEN,),
        "proj_out.weight": (context, HIDDEN),
        "proj_out.bias": (context,),
        **norm("norm_out", context),
    }
    for layer in range(DEPTH):
        attention, forward = f"layers.{layer}.0", f"layers.{layer}.1"
        found |= norm(f"{attention}.norm1", HIDDEN) | norm(f"{attention}.norm2", HIDDEN)
        found |= {
            f"{attention}.to_q.weight": (inner, HIDDEN),
            f"{attention}.to_kv.weight": (2 * inner, HIDDEN),
            f"{attention}.to_out.weight": (HIDDEN, inner),
            **norm(f"{forward}.0", HIDDEN),
            f"{forward}.1.weight": (4 * HIDDEN, HIDDEN),
            f"{forward}.3.weight": (HIDDEN, 4 * HIDDEN),
        }
    return found


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


PROJECTIONS = {"plain": plain, "plus": plus, "full": full}


def picture(seed: int, height: int = 40, width: int = 31) -> np.ndarray:
    """Of few colours, so that it looks the same when it is smaller."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return coarse.repeat(-(-height // 3), 0).repeat(-(-width // 3), 1)[:height, :width]
