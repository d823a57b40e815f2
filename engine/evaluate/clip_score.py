"""CLIP score: how well pictures fit their captions in the eyes of a CLIP.

    score = 100 max(cos(picture, caption), 0)

of the two unit vectors that CLIP makes. Hessel et al. (2021) published 2.5 max(cos, 0), and put "A photo
depicts" before the captions; torchmetrics and the papers on text-to-image report 100 cos of the captions as
they are, and so does this. Numbers from different CLIPs cannot be compared: name the model beside them.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from engine.parallel import Devices, pad
from engine.parts import module
from engine.text.reading import cut
from engine.types import UserError
from engine.weights.clip import load_clip
from engine.weights.clip_pixels import prepare

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
