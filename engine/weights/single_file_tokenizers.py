"""The tokenizers of a model in a single file, which has none: they come from a folder of the same model.

XL has two, with the same words. They differ in what fills a prompt up, at which the U-Net looks, too.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.text.tokenizer import Tokenizer
from engine.types import UserError
from engine.weights.folder import TOKENIZERS, check_parts_fit
from engine.weights.index import FILE
from engine.weights.original_configs import SECOND, Family

PAD = "!"  # with which the tokenizers of 2 and the second one of XL fill prompts up
PAD_ID = 0  # its id in the vocabulary of CLIP


def read_tokenizers(
    folder: Path, file: Path, family: Family, configs: Mapping[str, Any], by_convention: bool
) -> dict[str, Tokenizer]:
    """By the text encoder that they are for.

    Args:
      folder: of a tokenizer, or the one around tokenizer/, and for XL tokenizer_2/. Where there is but one,
        the second is the same with PAD.
      file: whose they become.
      by_convention: the configs are told by shapes; else they are those of a folder that was.

    Raises:
      UserError: they cannot be read, or are another model's.
    """
    around = any((folder / name).exists() for name in (FILE, *TOKENIZERS.values()))
    places = {kind: folder / TOKENIZERS[kind] if around else folder for kind in family.texts}
    first = folder / TOKENIZERS["text_encoder"] if around else folder
    found = {}
    for kind, place in places.items():
        alone = kind == "text_encoder_2" and (not around or (first.is_dir() and not place.is_dir()))
        places[kind] = first if alone else place
        found[kind] = _padded(first) if alone else Tokenizer.load(place)
    check_parts_fit(configs, found, file)
    for kind, tokenizer in found.items():
        _check(kind, tokenizer, places[kind], file, family, configs[kind], by_convention)
    return found


def _padded(folder: Path) -> Tokenizer:
    """A tokenizer, with PAD."""
    try:
        return Tokenizer.load(folder).padded_with(PAD)
    except UserError as error:
        told = str(error)
        raise UserError(told if str(folder) in told else f"{folder}: {told}") from None


def _check(
    kind: str, tokenizer: Tokenizer, folder: Path, file: Path, family: Family, text: Any, by_convention: bool
) -> None:
    take = f"take the {TOKENIZERS[kind]}/ of a folder of {family.name}"
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise UserError(
            f"{folder} has texts of {tokenizer.model_max_length} tokens, {file} of "
            f"{text.max_position_embeddings}: {take}"
        )
    if not by_convention:
        return
    if tokenizer.vocab_size != text.vocab_size:
        raise UserError(
            f"{folder} has {tokenizer.vocab_size} ids, the {kind} of {file} {text.vocab_size}: {take}"
        )
    # The U-Net looks at what fills a prompt up, too.
    wanted = PAD_ID if family is SECOND or kind == "text_encoder_2" else tokenizer.eos_id
    if tokenizer.pad_id != wanted:
        raise UserError(
            f"{folder} fills prompts up with id {tokenizer.pad_id}, {family.name} with {wanted}: {take}"
        )


def with_marks(configs: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer]) -> dict[str, Any]:
    """The configs, with the tokenizers' ids of the special tokens."""
    marked = {}
    for kind, tokenizer in tokenizers.items():
        marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_id") for mark in ("bos", "eos", "pad")}
        marked[kind] = dataclasses.replace(configs[kind], **marks)
    return {**configs, **marked}
