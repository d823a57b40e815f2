"""LoRAs of other shapes, as LyCORIS trains them, under the names that kohya's scripts give to layers.

For a kernel W of O outputs and I inputs (and of a window K x K, in a convolution), with scale = alpha / rank:

  LoHa   W + scale (w1_a w1_b) * (w2_a w2_b)   products of two thin matrices each, multiplied by elements
                                               (Hyeon-Woo et al. 2022, "FedPara", proposition 1)
  LoKr   W + scale (w1 kron w2)                Kronecker's product; either factor is whole, or the product of
                                               two thin ones; if both are whole, scale is 1
                                               (Edalati et al. 2022, "KronA")
  LoCon  W + scale (up mid down)               a convolution of K x K between two of 1 x 1

Thin parts of a convolution may have a core t of rank x rank x K x K between them (Hyeon-Woo et al.,
proposition 3). A file may have layers of several kinds, plain ones included. They are read, and never made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from engine.types import UserError
from engine.weights import lora_files, names
from engine.weights.component import Change, listed
from engine.weights.lora import Layer, layers_of, merging
from engine.weights.safetensors_io import DTYPES, read_header, read_tensor

Parts = dict[str, np.ndarray]  # what a file has of a layer, by the ends of its keys, in PyTorch's layout
Kernel = Float[Any, "O I *K"]  # of numpy, or of JAX

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
HADA = tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
KRON = tuple(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
ALPHA = "alpha"
OWN = (*HADA, *KRON, MID)  # by which such a file is known
KNOWN = (*OWN, UP, DOWN, ALPHA)


def read_all(loras: Sequence[tuple[str | Path, float]], configs: Mapping[str, Any]) -> Change:
    """Reads (file, scale) pairs, and returns what merges them into params as these are loaded.

    Raises:
      UserError: see `lora_files.read`.
    """
    changes = [_change(lora_files.find(path), scale, configs) for path, scale in loras]

    def change(name: str, array: np.ndarray) -> np.ndarray:
        for each in changes:
            array = each(name, array)
        return array

    return change


def _change(path: Path, scale: float, configs: Mapping[str, Any]) -> Change:
    if not any(key.endswith(OWN) for key in read_header(path)):
        return merging([(lora_files.read(path, configs), scale)])
    every = layers_of(configs)
    found = read(path, configs)

    def change(name: str, array: np.ndarray) -> np.ndarray:
        layer, _, leaf = name.rpartition(".")
        if leaf != "kernel" or layer not in found:
            return array
        path, shape = every[layer].path, every[layer].shape
        added = delta(found[layer], names.torch_shape(path, shape))
        return array.astype(np.float32) + np.float32(scale) * names.to_flax(path, added, array.ndim)

    return change


def read(path: str | Path, configs: Mapping[str, Any]) -> dict[str, Parts]:
    """What a file has for each layer of a model with these configs ("unet", "text_encoder", ...).

    Raises:
      UserError: it is broken, or for another model; in one line.
    """
    path = lora_files.find(path)
    every = layers_of(configs)
    header, underscored = lora_files.once(read_header(path), every, configs)
    found: dict[str, Parts] = {}
    unknown, foreign, mistyped = [], [], []
    with open(path, "rb") as file:
        for key, tensor in header.items():
            layer, _, part = key.partition(".")
            if part not in KNOWN:
                unknown.append(key)
            elif layer not in underscored:
                foreign.append(key)
            elif tensor.code not in DTYPES:
                mistyped.append(f"{key} is {tensor.code}")
            else:
                found.setdefault(underscored[layer], {})[part] = read_tensor(file, key, tensor).astype(
                    np.float32
                )
    faults = {"unknown keys": unknown, "layers that the model does not have": foreign, "wrong type": mistyped}
    if not mistyped:
        misfits = [name for name, parts in found.items() if not _fits(parts, every[name])]
        faults["wrong shape, or parts that are missing"] = misfits
    if any(faults.values()):
        told = "; ".join(f"{fault}: {listed(keys, 5)}" for fault, keys in faults.items() if keys)
        raise UserError(f"{path} does not fit this model: {told}")
    return found


def _fits(parts: Parts, layer: Layer) -> bool:
    """Whether the parts make a change of the layer's shape, by numbers."""
    shape = names.torch_shape(layer.path, layer.shape)
    try:
        jax.eval_shape(lambda parts: delta(parts, shape, jnp), parts)
    except (KeyError, ValueError, TypeError, IndexError):
        return False
    return ALPHA not in parts or bool(np.isfinite(parts[ALPHA]).all())


def delta(parts: Mapping[str, Any], shape: tuple[int, ...], xp: Any = np) -> Kernel:
    """What is added to a kernel of this shape, in PyTorch's layout, float32; with numpy, or jnp as `xp`.

    Raises:
      KeyError, ValueError, TypeError: the parts are not all there, or do not go together.
    """
    kind = _hadamard if HADA[0] in parts else _straight if UP in parts else _kronecker
    return kind(parts, shape, xp).reshape(shape)


def _hadamard(parts: Mapping[str, Any], shape: tuple[int, ...], xp: Any) -> Any:
    first, second = (
        _product(xp, *(parts.get(f"hada_{part}") for part in (f"w{i}_a", f"w{i}_b", f"t{i}"))) for i in (1, 2)
    )
    return _scale(parts, len(parts["hada_w1_b"])) * first * second


def _kronecker(parts: Mapping[str, Any], shape: tuple[int, ...], xp: Any) -> Any:
    w1, w2 = (
        parts[whole]
        if (whole := f"lokr_w{i}") in parts
        else _product(xp, *(parts.get(f"lokr_{part}") for part in (f"w{i}_a", f"w{i}_b", f"t{i}")))
        for i in (1, 2)
    )
    w2 = w2.reshape(shape[0] // len(w1), shape[1] // w1.shape[1], *shape[2:])
    ranks = [len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
    scale = _scale(parts, ranks[0]) if ranks else 1
    return scale * xp.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)


def _straight(parts: Mapping[str, Any], shape: tuple[int, ...], xp: Any) -> Any:
    up, down = (part.reshape(len(part), -1) for part in (parts[UP], parts[DOWN]))
    core = parts.get(MID)
    found = up @ down if core is None else _product(xp, up.T, down, core)
    return _scale(parts, len(down)) * found


def _product(xp: Any, a: Any, b: Any, core: Any) -> Any:
    """a b; with a core between them a is transposed: (rank, O)."""
    return a @ b if core is None else xp.einsum("ip,ij...,jr->pr...", a, core, b)


def _scale(parts: Mapping[str, Any], rank: int) -> Any:
    """alpha / rank; 1 where the file says no alpha."""
    return parts[ALPHA].reshape(()) / rank if ALPHA in parts else 1
