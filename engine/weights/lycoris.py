"""LoRAs of other shapes, as LyCORIS and PEFT train them, under the names of kohya's scripts or of diffusers.

For a kernel W of O outputs and I inputs (and of a window K x K, in a convolution), with scale = alpha / rank:

  LoHa   W + scale (w1_a w1_b) * (w2_a w2_b)   products of two thin matrices each, multiplied by elements
                                               (Hyeon-Woo et al. 2022, "FedPara", proposition 1)
  LoKr   W + scale (w1 kron w2)                Kronecker's product; either factor is whole, or the product of
                                               two thin ones; if both are whole, scale is 1
                                               (Edalati et al. 2022, "KronA")
  LoCon  W + scale (up mid down)               a convolution of K x K between two of 1 x 1

Any of them, and the plain LoRA, may be a DoRA (Liu et al. 2024, equation 5), which says how long each row of
the changed kernel is, or each of its columns: W + scale (m (W + D) / |W + D| - W), where D is what is added
to W above; a scale of 1 is as it was trained.

Thin parts of a convolution may have a core t of rank x rank x K x K between them (Hyeon-Woo et al.,
proposition 3). A file may have layers of several kinds, plain ones included. They are read, and never made.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from engine.types import UserError
from engine.weights import lora_files, names
from engine.weights.component import Change, listed
from engine.weights.lora import XL_KINDS, Layer, layers_of, merging
from engine.weights.safetensors_io import DTYPES, NUMBERS, Tensor, read_header, read_tensor

Parts = dict[str, np.ndarray]  # what a file has of a layer, by the ends of its keys, in PyTorch's layout
Kernel = Float[np.ndarray, "O I *K"]

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
HADA = tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
KRON = tuple(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
ALPHA, DORA = "alpha", "dora_scale"
KNOWN = (*HADA, *KRON, MID, UP, DOWN, ALPHA, DORA)
MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")  # the same of PEFT, always of rows
OWN = (*HADA, *KRON, MID, DORA, *MAGNITUDE)  # by which such a file is known
PEFT = {f"{end}.weight": DOWN if side == "a" else UP for end, side in lora_files.SIDES.items()}
PEFT |= {ALPHA: ALPHA} | dict.fromkeys(MAGNITUDE, DORA)
SIDES = (("w", "_a"), ("w", "_b"), ("t", ""))  # of a product: hada_w1_a, hada_w1_b, hada_t1
UNSUPPORTED = "diff"
PREFIX = r"^lycoris_(?=(down|mid|up)_block|conv_|time_|add_)"  # of LyCORIS' own wrapper, for the U-Net


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
        W = array.astype(np.float32)
        added = names.to_flax(path, delta(found[layer], names.torch_shape(path, shape)), array.ndim)
        if DORA in found[layer]:
            lengths = names.to_flax(path, found[layer][DORA], array.ndim)
            added = of_lengths(W + added, lengths) - W
        return W + np.float32(scale) * added

    return change


def of_lengths(W: Float[np.ndarray, "*K I O"], lengths: Float[np.ndarray, "*L A B"]) -> np.ndarray:
    """W, with these lengths along the axis that they have."""
    axes = tuple(axis for axis, size in enumerate(lengths.shape) if size == 1)
    return W * (lengths / (np.sqrt(np.square(W).sum(axes, keepdims=True)) + np.finfo(np.float32).eps))


def read(path: str | Path, configs: Mapping[str, Any]) -> dict[str, Parts]:
    """What a file has for each layer of a model with these configs ("unet", "text_encoder", ...).

    Raises:
      UserError: it is broken, or for another model; in one line.
    """
    path = lora_files.find(path)
    every = layers_of(configs)
    header, underscored = lora_files.once(read_header(path), every, configs)
    found: dict[str, Parts] = {}
    faults: dict[str, list[str]] = {}
    with open(path, "rb") as file:
        for key, tensor in header.items():
            name, part = _parsed(key, every, underscored)
            if fault := _fault(name, part, tensor, found):
                faults.setdefault(fault, []).append(key)
            else:
                array = read_tensor(file, key, tensor).astype(np.float32)
                turned = part == DORA and key.endswith(MAGNITUDE)  # (1, O, 1, 1) of a convolution
                found.setdefault(name, {})[part] = array.reshape(-1) if turned else array
    notes = lora_files.read_notes(path)
    for name, parts in found.items():
        if DOWN in parts and ALPHA not in parts:
            parts[ALPHA] = np.float32(lora_files.alpha_of(path, notes, name, len(parts[DOWN])))
        if DORA in parts:
            parts[DORA] = _lengths(parts[DORA], every[name])
    found = {name: parts for name, parts in found.items() if parts.keys() != {ALPHA}}  # which change nothing
    if not faults and (misfits := [name for name, parts in found.items() if not _fits(parts, every[name])]):
        faults["wrong shape, or parts that are missing"] = misfits
    if faults:
        told = "; ".join(f"{fault}: {listed(keys, 5)}" for fault, keys in faults.items())
        raise UserError(f"{path} does not fit this model: {told}")
    return found


def _parsed(key: str, every: Mapping[str, Layer], underscored: Mapping[str, str]) -> tuple[str | None, str]:
    """The layer of a key, None where the model has none, and which of its parts that is."""
    kind, _, rest = key.partition(".")
    if kind not in XL_KINDS:
        return underscored.get(re.sub(PREFIX, "lora_unet_", kind)), rest
    layer, end = next(
        ((rest.removesuffix(f".{end}"), end) for end in PEFT if rest.endswith(f".{end}")), (rest, "")
    )
    name = f"{kind}.{names.canonical(kind, layer)}"
    return name if name in every else None, PEFT.get(end, rest)


def _lengths(lengths: np.ndarray, layer: Layer) -> np.ndarray:
    """Of a DoRA, (O, 1, ...) of rows or (1, I, ...) of columns; as it is where it is neither."""
    outputs, inputs, *window = names.torch_shape(layer.path, layer.shape)
    if lengths.shape[:1] == (outputs,) and lengths.size == outputs:
        return lengths.reshape(outputs, 1, *[1] * len(window))
    if lengths.shape[:2] == (1, inputs) and lengths.size == inputs:
        return lengths.reshape(1, inputs, *[1] * len(window))
    return lengths


def _fault(name: str | None, part: str, tensor: Tensor, found: Mapping[str, Parts]) -> str:
    """Why a part of the layer `name` cannot be taken in; "" where it can."""
    if part.startswith(UNSUPPORTED):
        return "whole differences, which are not read"
    if part not in KNOWN:
        return "unknown keys"
    if name is None:
        return "layers that the model does not have"
    if part in found.get(name, {}):
        return "given twice"
    known = NUMBERS if part == ALPHA else DTYPES
    return "" if tensor.code in known else f"wrong type {tensor.code}"


def _fits(parts: Parts, layer: Layer) -> bool:
    """Whether the parts are those of one kind, and make a change of the layer's shape, by numbers."""
    outputs, inputs, *window = names.torch_shape(layer.path, layer.shape)
    kinds = [kind for kind in (HADA, KRON, (UP, DOWN, MID)) if not parts.keys().isdisjoint(kind)]
    if len(kinds) != 1 or not all(array.size and np.isfinite(array).all() for array in parts.values()):
        return False
    if ALPHA in parts and parts[ALPHA].size != 1:
        return False
    rows = (outputs, 1, *[1] * len(window)), (1, inputs, *[1] * len(window))
    if DORA in parts and parts[DORA].shape not in rows:
        return False
    try:
        if kinds[0] == KRON:
            w1, w2 = _factors(parts)
            rows, columns = len(w1) * len(w2), w1.shape[1] * w2.reshape(len(w2), -1).shape[1]
            return (rows, columns) == (outputs, inputs * math.prod(window))
        if kinds[0] == HADA:
            sides = [
                (parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}"), True) for i in (1, 2)
            ]
        else:
            sides = [(parts[UP], parts[DOWN], parts.get(MID), False)]
        return all(_is_product(*side, outputs, inputs, window) for side in sides)
    except (KeyError, ValueError, IndexError):
        return False


def _is_product(a, b, core, turned: bool, outputs: int, inputs: int, window: Sequence[int]) -> bool:
    """Whether a, b and the core go together; `turned`: with a core, a is (rank, O) and not (O, rank)."""
    rank = len(b)
    rows = a.reshape(len(a), -1).T if turned and core is not None else a.reshape(len(a), -1)
    if rows.shape != (outputs, rank):
        return False
    if core is None:
        return b.size == rank * inputs * math.prod(window)
    return core.shape == (rank, rank, *window) and b.size == rank * inputs


def delta(parts: Parts, shape: tuple[int, ...]) -> Kernel:
    """What is added to a kernel of this shape, in PyTorch's layout, float32, by parts that fit."""
    if HADA[0] in parts:
        first, second = (
            _product(*(parts.get(f"hada_{part}{i}{side}") for part, side in SIDES)) for i in "12"
        )
        return (_scale(parts, len(parts["hada_w1_b"])) * first * second).reshape(shape)
    if UP in parts:
        up, down = (part.reshape(len(part), -1) for part in (parts[UP], parts[DOWN]))
        core = parts.get(MID)
        found = _product(up if core is None else up.T, down, core)
        return (_scale(parts, len(down)) * found).reshape(shape)
    w1, w2 = _factors(parts)
    w2 = w2.reshape(len(w2), shape[1] // w1.shape[1], *shape[2:])
    ranks = [len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
    scale = _scale(parts, ranks[0]) if ranks else np.float32(1)
    return (scale * np.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)).reshape(shape)


def _factors(parts: Parts) -> list[np.ndarray]:
    """w1 and w2 of a LoKr."""
    return [
        parts[f"lokr_w{i}"]
        if f"lokr_w{i}" in parts
        else _product(parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"], parts.get(f"lokr_t{i}"))
        for i in (1, 2)
    ]


def _product(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    """a b, of (O, rank) and (rank, ...); with a core of (rank, rank, K, K) between them a is (rank, O)."""
    b = b.reshape(len(b), -1)
    if core is None:
        return a @ b
    return np.einsum("ip,ij...,jr->pr...", a, core, b, optimize=True)


def _scale(parts: Parts, rank: int) -> np.float32:
    """alpha / rank; 1 where the file says no alpha."""
    return np.float32(parts[ALPHA].reshape(()) / rank if ALPHA in parts else 1)
