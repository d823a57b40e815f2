"""Files of LoRAs, as PyTorch diffusers and kohya's scripts write them. Ours are those of diffusers.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight, ...lora_B.weight
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight, ...

Rank and alpha stand in the metadata `lora_adapter_metadata`, under the names of PEFT's LoraConfig. Where a
file does not say alpha, it is the rank. kohya's scripts put an underscore for each dot, and alphas beside:

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight, ...lora_up.weight
    lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha, ...

Which dots there were, the names of the model's layers say. For SDXL, whose text encoders are lora_te1 and
lora_te2, they mostly name the layers of the U-Net as its first program did (engine.weights.original_names):

    lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight
"""

import collections
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.types import UserError
from engine.weights import names, original_names
from engine.weights.component import listed
from engine.weights.files import PICKLES, new_file
from engine.weights.lora import XL_KINDS, Layer, Lora, layers_of
from engine.weights.safetensors_io import (
    DTYPES,
    NUMBERS,
    Tensor,
    read_header,
    read_metadata,
    read_tensor,
    write,
)

FILE = "pytorch_lora_weights.safetensors"  # in a folder
METADATA = "lora_adapter_metadata"
EXAMPLE_LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
EXAMPLE = f"{EXAMPLE_LAYER}.lora_A.weight"

# How diffusers has named A and B over time. The oldest put the layer's name into a processor's.
SIDES = {"lora_A": "a", "lora.down": "a", "lora_linear_layer.down": "a"}
SIDES |= {"lora_B": "b", "lora.up": "b", "lora_linear_layer.up": "b"}
KOHYA = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"}
KOHYA_KINDS = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, SIDES))})\.weight")
_OLDEST = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.")


# ---- written


def save(path: str | Path, lora: Lora) -> Path:
    """Writes a file in the format of diffusers, whole or not at all, and returns its path.

    Args:
      path: FILE.safetensors; anything else is a folder, and the file in it has the name that diffusers gives.

    Raises:
      OSError: no space left, or the place cannot be written.
    """
    path = Path(os.path.expanduser(path))
    path = path if path.suffix == ".safetensors" else path / FILE
    tensors = {}
    for name, layer in lora.layers.items():
        for side, stored in (("a", "lora_A"), ("b", "lora_B")):
            array = np.asarray(layer[side])
            tensors[f"{name}.{stored}.weight"] = array.transpose(names.TO_TORCH[array.ndim])
    shapes = {key: array.shape for key, array in tensors.items()}
    dtypes = {key: array.dtype for key, array in tensors.items()}
    notes = json.dumps(_notes(lora), indent=2, sort_keys=True)
    with new_file(path) as new:
        write(new, shapes, dtypes, tensors.__getitem__, {METADATA: notes})
    return path


def _notes(lora: Lora) -> dict[str, Any]:
    """PEFT's LoraConfig of each part: "unet.r", "unet.lora_alpha", ...; what differs from it, by layer."""
    notes = {}
    for kind in XL_KINDS:
        ours = {name: layer for name, layer in lora.layers.items() if name.startswith(f"{kind}.")}
        if not ours:
            continue
        # transformers 5 has no text_model, and PEFT takes ends of names
        short = {name: name.removeprefix(f"{kind}.").removeprefix("text_model.") for name in ours}
        rank, ranks = _usual({short[name]: layer["a"].shape[-1] for name, layer in ours.items()})
        alpha, alphas = _usual({short[name]: lora.alphas[name] for name in ours})
        config = {"r": rank, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": alphas}
        config["target_modules"] = sorted(short.values())
        notes |= {f"{kind}.{option}": value for option, value in config.items()}
    return notes


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and all others by name."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    return usual, {name: value for name, value in values.items() if value != usual}


# ---- read


def find(path: str | Path) -> Path:
    """The file of a LoRA: `path`, or the one that diffusers writes into a folder; UserError without one."""
    path = Path(os.path.expanduser(path))
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no LoRA {path}: write the path of a .safetensors file, or of a folder with {FILE}")
    if path.name.endswith(PICKLES):
        raise UserError(
            f"{path} is in a format that is never opened because it can run code: convert it with PyTorch "
            "diffusers, load_lora_weights(...) and save_lora_weights(..., safe_serialization=True)"
        )
    return path


def read(path: str | Path, configs: Mapping[str, Any]) -> Lora:
    """Reads the LoRA of a model with these configs ("unet", "text_encoder", ...); its arrays are on the host.

    Raises:
      UserError: no file, a broken one, one without a LoRA, or the LoRA of another model; in one line.
    """
    path = find(path)
    every = layers_of(configs)
    matrices, numbers = _sorted_out(path, *once(read_header(path), every, configs), every)
    layers, alphas, notes = {}, {}, read_notes(path)
    with open(path, "rb") as file:
        for name, sides in matrices.items():
            arrays = {side: read_tensor(file, *stored) for side, stored in sides.items()}
            shapes = every[name].shapes(len(arrays["a"]))
            layers[name] = {}
            for side, array in arrays.items():
                array = array.reshape(names.torch_shape(every[name].path, shapes[side]))
                layers[name][side] = array.transpose(names.TO_FLAX[array.ndim])
            alphas[name] = alpha_of(path, notes, name, layers[name]["a"].shape[-1])
        for name in numbers.keys() & layers.keys():
            alphas[name] = float(read_tensor(file, *numbers[name]).reshape(()))
    if strange := [name for name, alpha in alphas.items() if not math.isfinite(alpha)]:
        raise UserError(f"{path}: alpha is no number for {listed(strange)}")
    return Lora(layers, alphas)


Stored = tuple[str, Tensor]  # a key of the file, and where it is


def _sorted_out(
    path: Path, header: Mapping[str, Tensor], underscored: Mapping[str, str], layers: Mapping[str, Layer]
) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """Layer -> side -> where it is stored, and layer -> where its alpha is; UserError unless all fits.

    Args:
      underscored: kohya's names for the layers.
    """
    matrices, alphas, unknown, foreign, twice = {}, {}, [], [], []
    for key, tensor in header.items():
        name, side = _of_kohya(key, underscored) if key.startswith("lora_") else _parsed(key)
        if side is None:
            unknown.append(key)
        elif name not in layers:
            foreign.append(key)
        elif side in matrices.get(name, ()) or (side == "alpha" and name in alphas):
            twice.append(key)
        elif side == "alpha":
            alphas[name] = (key, tensor)
        else:
            matrices.setdefault(name, {})[side] = (key, tensor)
    if not matrices and not foreign:
        raise UserError(
            f"{path} holds no LoRA of PyTorch diffusers, such as {EXAMPLE}, nor of kohya, such as "
            f"{_underscored(EXAMPLE_LAYER)[0]}.lora_down.weight; it holds {listed(unknown, 3)}"
        )
    faults = {"unknown keys": unknown, "layers that the model does not have": foreign}
    faults["given twice"] = twice
    faults["A without B or B without A"] = [name for name, sides in matrices.items() if len(sides) < 2]
    whole = {name: sides for name, sides in matrices.items() if len(sides) == 2}
    faults["wrong shape"] = _misshapen(whole, layers)
    every = [(*stored, DTYPES) for sides in matrices.values() for stored in sides.values()]
    every += [(*stored, NUMBERS) for stored in alphas.values()]
    faults["wrong type"] = [
        f"{key} is {tensor.code}" for key, tensor, known in every if tensor.code not in known
    ]
    faults["no single number"] = [key for key, tensor in alphas.values() if math.prod(tensor.shape) != 1]
    if any(faults.values()):
        told = "; ".join(f"{fault}: {listed(keys, 5)}" for fault, keys in faults.items() if keys)
        raise UserError(f"{path} does not fit this model: {told}")
    return matrices, alphas


def _parsed(key: str) -> tuple[str, str | None]:
    """The layer's name, and "a", "b" or "alpha"; None for what is none of them."""
    kind, _, rest = key.partition(".")
    rest = _OLDEST.sub(lambda old: f".{old[1].replace('to_out', 'to_out.0')}.lora.", rest)
    layer, alpha, end = rest.rpartition(".alpha")
    found = _KEY.fullmatch(rest)
    if kind not in XL_KINDS or not (found or (alpha and not end)):
        return key, None
    layer, side = (found[1], SIDES[found[2]]) if found else (layer, "alpha")
    return f"{kind}.{names.canonical(kind, layer)}", side


def _of_kohya(key: str, underscored: Mapping[str, str]) -> tuple[str, str | None]:
    """The same for a name of kohya's; `underscored`: its names for the model's layers."""
    layer, _, rest = key.partition(".")
    return underscored.get(layer, key), KOHYA.get(rest)


def once(
    header: Mapping[str, Tensor], layers: Iterable[str], configs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is in a file, and kohya's names for the layers.

    Some files have layers of the U-Net under either name, to be read by any program. One is left out.
    """
    plain = {full: name for name in layers for full in _underscored(name)}
    original = _original_names(layers, configs.get("unet"))
    spelt = {plain[layer] for layer in map(_first, header) if layer in plain}
    once = {key: tensor for key, tensor in header.items() if original.get(_first(key)) not in spelt}
    return once, original | plain


def _original_names(layers: Iterable[str], unet: Any) -> dict[str, str]:
    """The names of kohya's that go by the U-Net's original layout; none for one without a place in it."""
    keys = [f"{name[len('unet.') :]}.weight" for name in layers if name.startswith("unet.")]
    try:
        slots = original_names.slots("unet", unet, keys, original_names.UNET) if keys else {}
    except UserError:
        return {}
    start, end = len(original_names.UNET), -len(".weight")
    return {
        _joined(KOHYA_KINDS["unet"][0], slot.key[start:end]): f"unet.{key[:end]}"
        for key, slot in slots.items()
    }


def _underscored(name: str) -> list[str]:
    """kohya's names for a layer, the usual one first."""
    kind, _, layer = name.partition(".")
    return [_joined(start, layer) for start in KOHYA_KINDS[kind]]


def _joined(start: str, layer: str) -> str:
    return f"{start}_{layer.replace('.', '_')}"


def _first(key: str) -> str:
    return key.partition(".")[0]


def _misshapen(matrices: Mapping[str, dict[str, Stored]], layers: Mapping[str, Layer]) -> list[str]:
    faults = []
    for name, sides in matrices.items():
        rank = max([1, *sides["a"][1].shape[:1]])
        for side, shape in layers[name].shapes(rank).items():
            key, tensor = sides[side]
            wanted = names.torch_shape(layers[name].path, shape)
            # kohya's scripts have as 1x1 convolutions what is linear in Stable Diffusion 2
            if wanted not in (tensor.shape, tensor.shape[:2] if tensor.shape[2:] == (1, 1) else None):
                faults.append(f"{key} is {tensor.shape}, not {wanted}")
    return faults


def read_notes(path: Path) -> dict[str, Any]:
    """What the file says of itself, as PEFT's LoraConfig."""
    try:
        notes = json.loads(read_metadata(path).get(METADATA, "{}"))
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict):
        raise UserError(f"{path}: its metadata {METADATA} is no JSON object: write the file again")
    return notes


def alpha_of(path: Path, notes: Mapping[str, Any], name: str, rank: int) -> float:
    """A layer's alpha, as PEFT finds it in a LoraConfig: by pattern, else the one for all, else the rank."""
    kind, _, layer = name.partition(".")
    try:
        patterns = dict(notes.get(f"{kind}.alpha_pattern") or {})
        hits = (alpha for end, alpha in patterns.items() if re.match(rf"(.*\.)?({end})$", layer))
        alpha = float(next(hits, notes.get(f"{kind}.lora_alpha", rank)))
    except (TypeError, ValueError, OverflowError, re.error):
        raise UserError(f"{path}: its metadata {METADATA} has a strange alpha for {kind}") from None
    return alpha * rank**0.5 if notes.get(f"{kind}.use_rslora") else alpha
