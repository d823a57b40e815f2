"""Tiny folders that are, by convention, Stable Diffusion 1, 2 or XL; and files as others write them."""

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from safetensors.numpy import load_file, save_file

from engine.text.tokenizer import Tokenizer
from engine.weights import single_file_written
from engine.weights.component import abstract
from engine.weights.folder import save_folder
from engine.weights.names import to_key, torch_shape
from engine.weights.original_configs import FAMILIES, REFINER, XL
from engine.weights.original_names import OPEN_CLIP, slots
from engine.weights.random_folder import ARCHITECTURES
from tests.tiny import tiny_model

VAE = {
    "block_out_channels": (32, 64),
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "layers_per_block": 2,
}
VAE |= {"sample_size": 512}
UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 64,
    "sample_size": 64,
}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2}
OPTIONS = (
    {
        # a size more, so that attention is followed by a change of size, and so is none
        "unet": UNET
        | {
            "block_out_channels": (32, 64, 64),
            "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        "text_encoder": TEXT | {"projection_dim": 768},
    },
    {
        "unet": UNET
        | {
            "block_out_channels": (64, 128),
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
            "upcast_attention": True,
            "sample_size": 96,
        },
        "text_encoder": TEXT | {"hidden_act": "gelu", "projection_dim": 512},
    },
)


def like(number: int, path: pathlib.Path, **unet) -> pathlib.Path:
    """Writes the folder of a tiny Stable Diffusion `number`, 1 or 2, whose configs are those of convention.

    Args:
      unet: further options of it.
    """
    options = OPTIONS[number - 1]
    model = tiny_model(
        unet=options["unet"] | unet,
        vae=VAE,
        text_encoder=options["text_encoder"],
        scheduler=dict(FAMILIES[number - 1].architecture.scheduler),
    )
    if number == 2:
        model = dataclasses.replace(model, tokenizer=padded_with_the_first(model.tokenizer))
        text = dataclasses.replace(model.text_encoder.config, pad_token_id=0)
        model = dataclasses.replace(model, text_encoder=dataclasses.replace(model.text_encoder, config=text))
    save_folder(path, model)
    return path


XL_UNET = UNET | {
    "block_out_channels": (64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "upcast_attention": None,
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
XL_TEXTS = {
    "text_encoder": TEXT | {"projection_dim": 768},
    "text_encoder_2": TEXT | {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 32},
}
XL_VAE = VAE | {"layers_per_block": 1, "sample_size": 1024, "scaling_factor": 0.13025}


def like_xl(path: pathlib.Path, refines: bool = False, **unet) -> pathlib.Path:
    """Writes the folder of a tiny SDXL or of its refiner, whose configs are those of convention.

    Args:
      unet: further options of it.
    """
    own = {"cross_attention_dim": 192, "transformer_layers_per_block": 2}
    own["projection_class_embeddings_input_dim"] = 32 + 6 * 256
    if refines:
        own = {"cross_attention_dim": 128, "projection_class_embeddings_input_dim": 32 + 5 * 256}
    model = tiny_model(
        unet=XL_UNET | own | unet,
        vae=XL_VAE,
        scheduler=dict((REFINER if refines else XL).architecture.scheduler),
        text_encoder=None if refines else XL_TEXTS["text_encoder"],
        text_encoder_2=XL_TEXTS["text_encoder_2"] | {"pad_token_id": 0},
    )
    save_folder(path, dataclasses.replace(model, tokenizer_2=padded_with_the_first(model.tokenizer_2)))
    return path


def padded_with_the_first(tokenizer: Tokenizer) -> Tokenizer:
    """As Stable Diffusion 2 has it: prompts are filled up with the token of id 0."""
    return tokenizer.padded_with(tokenizer.pieces("!")[0][1].removesuffix("</w>"))


def foreign(
    folder: pathlib.Path, file: pathlib.Path, changes: Mapping[str, np.ndarray | None] = MappingProxyType({})
) -> pathlib.Path:
    """Writes the single file of a folder as others do, without our notes in it.

    Args:
      changes: further tensors, or others; None: it is left out.
    """
    single_file_written.to_file(folder, file, overwrite=True)
    return rewritten(file, file, changes)


def rewritten(
    source: pathlib.Path, file: pathlib.Path, changes: Mapping[str, np.ndarray | None]
) -> pathlib.Path:
    """Writes the tensors of `source` with these changes, and no notes."""
    tensors = load_file(source) | dict(changes)
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    return file


def whole_open_clip(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the original file of 2 has beside what is used: a last layer, the projection, the temperature."""
    prefix = f"{OPEN_CLIP}transformer.resblocks."
    count = len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})
    last = f"{prefix}{count - 1}."
    more = {
        key.replace(last, f"{prefix}{count}."): 0 * tensor
        for key, tensor in tensors.items()
        if key.startswith(last)
    }
    width = len(tensors[f"{OPEN_CLIP}ln_final.weight"])
    more[f"{OPEN_CLIP}text_projection"] = np.eye(width, dtype=np.float32)
    return more | {f"{OPEN_CLIP}logit_scale": np.float32([4.6])}


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a model's folder."""
    return {
        f"{file.parent.name}.{key}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file in a folder, by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def published(name: str, file: pathlib.Path, *lost: str) -> None:
    """Writes the header of a file in the full size, without `lost`, and a hole in place of the weights."""
    header = {}
    (family,) = (family for family in FAMILIES if family.architecture is ARCHITECTURES[name])
    for kind, prefix in family.prefixes.items():
        config = getattr(family.architecture, kind)
        leaves = abstract(kind, config)[1].items()
        shapes = {to_key(path): torch_shape(path, leaf.shape) for path, leaf in leaves}
        found = slots(kind, config, shapes, prefix)
        header |= {slot.key: slot.shape(shapes[key]) for key, slot in found.items()}
    last = f"{OPEN_CLIP}transformer.resblocks.22."
    header |= {key.replace(".22.", ".23."): shape for key, shape in header.items() if key.startswith(last)}
    header |= {f"{OPEN_CLIP}text_projection": (1024, 1024)} if name == "sd21" else {}
    entries, end = {}, 0
    for key, shape in header.items():
        if key.startswith(lost):
            continue
        start, end = end, end + 2 * math.prod(shape)
        entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
