"""CLIP score: how well pictures fit their captions in the eyes of a CLIP.

    score = 100 max(cos(picture, caption), 0)

of the two unit vectors that CLIP makes. Hessel et al. (2021) published 2.5 max(cos, 0), and put "A photo
depicts" before the captions; torchmetrics and the papers on text-to-image report 100 cos of the captions as
they are, and so does this. Numbers from different CLIPs cannot be compared: name the model beside them.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from engine.models.clip_vision import CLIPConfig
from engine.parallel import Devices, pad
from engine.parts import module
from engine.text.reading import cut
from engine.text.tokenizer import Tokenizer
from engine.types import UserError
from engine.weights.clip_pixels import PixelsConfig, prepare, read_pixels_config
from engine.weights.component import Component, load_component

Picture = UInt8[np.ndarray, "_ _ 3"]
Pictures = Sequence[Picture] | UInt8[np.ndarray, "_ _ _ 3"]


class ClipScores(NamedTuple):
    """What `ClipScorer.score` found."""

    scores: Float[np.ndarray, " N"]  # of each picture, 0..100
    truncated: int  # captions whose end CLIP did not read

    @property
    def mean(self) -> float:
        """The number that is reported."""
        return float(self.scores.mean())


class Clip(NamedTuple):
    """A CLIP with all that it takes to show it pictures and captions."""

    model: Component
    tokenizer: Tokenizer
    pixels: PixelsConfig


def load_clip(folder: str | os.PathLike, place: Callable[[str, np.ndarray], Any]) -> Clip:
    """Loads a folder as `ClipScorer` does. place: (name, array) -> the array where it is to lie."""
    folder = Path(os.path.expanduser(folder))
    _check_is_clip(folder)
    tokenizer, pixels = Tokenizer.load(folder), read_pixels_config(folder)
    model = load_component(folder, "clip", place=place)
    _check_parts_fit(folder, model.config, tokenizer, pixels)
    return Clip(model, tokenizer, pixels)


class ClipScorer:
    """A CLIP on the devices. It is compiled once, by the first call of `score`."""

    def __init__(self, folder: str | os.PathLike, devices: Devices | None = None, batch_size: int = 32):
        """Loads the model in float32.

        Args:
          folder: as transformers saves it or the hub gives it: config.json, model.safetensors or its shards,
            the tokenizer's files, and preprocessor_config.json.
          devices: all local ones, unless told.
          batch_size: pictures that a device takes at once.

        Raises:
          UserError: a file is missing, broken, or of something else than a CLIP; or batch_size is below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: write 1 or more")
        self.devices = devices or Devices()
        self.model, self.tokenizer, self.pixels = load_clip(folder, self.devices.place)
        self.batch_size = batch_size
        self._cosines = self.devices.map(self._cosines_of)

    def score(self, batches: Iterable[tuple[Pictures, Sequence[str]]]) -> ClipScores:
        """Scores pictures, each with its caption.

        Args:
          batches: pictures, uint8 of any sizes, and as many captions. A caption longer than the tokenizer's
            model_max_length (77 with start and end) is cut, and counted.

        Raises:
          ValueError: other numbers of pictures and captions, or no picture at all.
        """
        size = self.batch_size * self.devices.count
        pairs, scores, truncated = _pairs(batches), [], 0
        while some := list(itertools.islice(pairs, size)):
            pictures, captions = zip(*some, strict=True)
            truncated += sum(cut(caption, self.tokenizer) is not None for caption in captions)
            batch = {
                "pixels": pad(np.stack([prepare(picture, self.pixels) for picture in pictures]), size),
                "ids": pad(self.tokenizer.encode(list(captions)), size),
            }
            cosines = self._cosines(self.model.params, self.devices.shard_batch(batch))
            scores.append(100 * self.devices.fetch(cosines)[: len(some)].clip(min=0))
        if not scores:
            raise ValueError("no pictures to score")
        return ClipScores(np.concatenate(scores), truncated)

    def _cosines_of(self, params: Any, batched: Any) -> Float[Array, " B"]:
        # A score is compared with others', so no accelerator may round the factors of its products.
        with jax.default_matmul_precision("highest"):
            clip = module(self.model, params)
            texts, pictures = clip.text_features(batched["ids"]), clip.image_features(batched["pixels"])
            return jnp.sum(texts * pictures, axis=-1)


def _pairs(batches: Iterable[tuple[Pictures, Sequence[str]]]) -> Iterator[tuple[Picture, str]]:
    for pictures, captions in batches:
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures for {len(captions)} captions")
        yield from zip(pictures, captions, strict=True)


def _check_is_clip(folder: Path) -> None:
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
