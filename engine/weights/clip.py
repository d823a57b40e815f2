"""A CLIP in a folder, as transformers saves it: the model, its tokenizer, and how it wants its pictures."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.models.clip_vision import CLIPConfig
from engine.text.tokenizer import Tokenizer
from engine.types import UserError
from engine.weights.clip_pixels import PixelsConfig, read_pixels_config
from engine.weights.component import Component, load_component


class Clip(NamedTuple):
    """A CLIP with all that it takes to show it pictures and captions."""

    model: Component
    tokenizer: Tokenizer
    pixels: PixelsConfig


def load_clip(folder: str | os.PathLike, place: Callable[[str, np.ndarray], Any]) -> Clip:
    """Loads the model in float32.

    Args:
      folder: config.json, model.safetensors or its shards, the tokenizer's files, and
        preprocessor_config.json.
      place: (name, array) -> the array where it is to lie.

    Raises:
      UserError: a file is missing, broken, or of something else than a CLIP.
    """
    folder = Path(os.path.expanduser(folder))
    look(folder)
    tokenizer, pixels = Tokenizer.load(folder), read_pixels_config(folder)
    model = load_component(folder, "clip", place=place)
    _check_parts_fit(folder, model.config, tokenizer, pixels)
    return Clip(model, tokenizer, pixels)


def look(folder: str | os.PathLike) -> None:
    """UserError where a folder holds no CLIP; reads nothing of it."""
    folder = Path(os.path.expanduser(folder))
    if not (folder / "config.json").is_file():
        present = sorted(file.name for file in folder.iterdir())[:20] if folder.is_dir() else []
        held = f"it holds {', '.join(present) or 'nothing'}" if folder.is_dir() else "there is no such folder"
        raise UserError(
            f"{folder} is no CLIP: looked for config.json beside model.safetensors, tokenizer.json and "
            f"preprocessor_config.json; {held} (nothing is fetched by name: download it first)"
        )


def _check_parts_fit(folder: Path, config: CLIPConfig, tokenizer: Tokenizer, pixels: PixelsConfig) -> None:
    """UserError where the files of different models stand in one folder."""
    text, side = config.text_config, config.vision_config.image_size
    told = f"{folder}: the files are of different models: config.json has"
    if pixels.shape != (side, side):
        made = "of many sizes" if pixels.shape is None else "of {} x {}".format(*pixels.shape)
        raise UserError(f"{told} image_size {side}, and the preprocessor makes pictures {made}")
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(f"{told} vocab_size {text.vocab_size}, the tokenizer {tokenizer.vocab_size} ids")
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise UserError(
            f"{told} max_position_embeddings {text.max_position_embeddings}, and tokenizer_config.json "
            f"model_max_length {tokenizer.model_max_length}"
        )
    if text.eos_token_id not in (2, tokenizer.eos_id):  # 2: the largest id, see CLIPTextTransformer
        raise UserError(
            f"{told} eos_token_id {text.eos_token_id}, and the tokenizer ends texts with {tokenizer.eos_id}"
        )
