"""LoRAs of other shapes, as LyCORIS and PEFT train them, under the names of kohya's scripts or of diffusers.

For a kernel W of O outputs and I inputs (and of a window K x K, in a convolution), with scale = alpha / rank:

  LoHa   W + scale (w1_a w1_b) * (w2_a w2_b)   products of two thin matrices each, multiplied by elements
                                               (Hyeon-Woo et al. 2022, "FedPara", proposition 1)
  LoKr   W + scale (w1 kron w2)                Kronecker's product; either factor is whole, or the product of
                                               two thin ones; if both are whole, scale is 1
                                               (Edalati et al. 2022, "KronA")
  LoCon  W + scale (up mid down)               a convolution of K x K between two of 1 x 1

Any of them, and the plain LoRA, may be a DoRA (Liu et al. 2024, equation 5), which says how long each row of
the changed kernel is, or each of its columns: to W is added s (m (W + D) / |W + D| - W), where D is what is
added above and s the scale that it is given; 1 is as it was trained, and other files beside it change nothing
of it, as in PEFT. Of a scale below 1 every program has its own idea: here it goes part of the way.

Thin parts of a convolution may have a core t of rank x rank x K x K between them (Hyeon-Woo et al.,
proposition 3). A file may have layers of several kinds, plain ones included. They are read, and never made.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from engine.types import UserError
from engine.weights import lora_files, names
from engine.weights.component import Change, listed
from engine.weights.lora import XL_KINDS, Layer, layers_of, merging
from engine.weights.safetensors_io import DTYPES, NUMBERS, Tensor, read_header, read_tensor

# (name, as it is so far, as it is in the model's file) -> with what a file adds, see `Change`
MoreChange = Callable[[str, np.ndarray, np.ndarray], np.ndarray]
Parts = dict[str, np.ndarray]  # what a file has of a layer, by the ends of its keys, in PyTorch's layout
Kernel = Float[np.ndarray, "O I *K"]

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
HADA = tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
WHOLE = {"lokr_w1", "lokr_w2"}
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
        base = array
        for each in changes:
            array = each(name, array, base)
        return array

    return change


def _change(file: Path, scale: float, configs: Mapping[str, Any]) -> MoreChange:
    if not any(key.endswith(OWN) for key in read_header(file)):
        plain = merging([(lora_files.read(file, configs), scale)])
        return lambda name, array, base: plain(name, array)
    every = layers_of(configs)
    found = read(file, configs)

    def change(name: str, array: np.ndarray, base: np.ndarray) -> np.ndarray:
        layer, _, leaf = name.rpartition(".")
        if leaf != "kernel" or layer not in found:
            return array
        path, parts = every[layer].path, found[layer]
        W = names.to_torch(path, base.astype(np.float32))
        added = delta(parts, W.shape)
        if DORA in parts:
            added = of_lengths(W + added, parts[DORA]) - W
        return array.astype(np.float32) + np.float32(scale) * names.to_flax(path, added, array.ndim)

    return change


def of_lengths(W: Kernel, lengths: Float[np.ndarray, "A B *L"]) -> Kernel:
    """W, its rows of the lengths (O, 1, ...), or its columns of (1, I, ...), see `_allowed`."""
    axes = tuple(axis for axis in range(W.ndim) if axis != int(len(lengths) == 1))
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
            rank = max([1, *parts[DOWN].shape[:1]])
            parts[ALPHA] = np.float32(lora_files.alpha_of(path, notes, name, rank))
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
    if kind not in XL_KINDS and (end := next((each for each in MAGNITUDE if key.endswith(each)), None)):
        # diffusers' own way to kohya's format leaves dots before it
        return underscored.get(key.removesuffix(f".{end}").replace(".", "_")), DORA
    if kind not in XL_KINDS:
        return underscored.get(re.sub(PREFIX, "lora_unet_", kind)), rest
    layer, end = next(
        ((rest.removesuffix(f".{end}"), end) for end in PEFT if rest.endswith(f".{end}")), (rest, "")
    )
    name = f"{kind}.{names.canonical(kind, layer)}"
    return name if name in every else None, PEFT.get(end, rest)


def _allowed(layer: Layer) -> tuple[names.Shape, names.Shape]:
    """The shapes of the lengths of a DoRA: of rows, and of columns."""
    outputs, inputs, *window = names.torch_shape(layer.path, layer.shape)
    return (outputs, 1, *[1] * len(window)), (1, inputs, *[1] * len(window))


def _lengths(lengths: np.ndarray, layer: Layer) -> np.ndarray:
    """Those of a DoRA in a shape that is allowed; as they are where they have none."""
    rows, columns = _allowed(layer)
    if lengths.shape[:1] == rows[:1] and lengths.size == rows[0]:
        return lengths.reshape(rows)
    if lengths.shape[:2] == columns[:2] and lengths.size == columns[1]:
        return lengths.reshape(columns)
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
    # of two whole factors alpha says nothing, and of large files in half precision it is infinite
    used = {name: array for name, array in parts.items() if name != ALPHA or not parts.keys() >= WHOLE}
    if len(kinds) != 1 or not all(array.size and np.isfinite(array).all() for array in used.values()):
        return False
    if ALPHA in parts and parts[ALPHA].size != 1:
        return False
    if DORA in parts and parts[DORA].shape not in _allowed(layer):
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
    except (KeyError, ValueError, IndexError, TypeError):
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
