"""Textual inversion (Gal et al. 2022): a model's loss becomes one over the vectors of a new word."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from engine.config import InversionConfig
from engine.pixels import Unusable
from engine.text.tokenizer import Tokenizer
from engine.train.step import Loss
from engine.types import Params, UserError
from engine.weights import embeddings
from engine.weights.component import Component
from engine.weights.folder import Model, with_words

NAMES = {"text_encoder": "embedding", "text_encoder_2": "embedding_2"}  # of the vectors, in the params


@dataclasses.dataclass(frozen=True)
class Inversion:
    """A word in training. Its params are {"embedding": (N, D)}, and of SDXL also "embedding_2": (N, E)."""

    config: InversionConfig
    seed: int  # of the templates that are drawn
    every: tuple[embeddings.Words, ...]  # as it begins, of each text encoder

    @property
    def words(self) -> embeddings.Words:
        """Of the first text encoder. All read alike."""
        return self.every[0]

    @property
    def params(self) -> Params:
        """As the training begins."""
        return {NAMES[own.kind]: own.vectors for own in self.every}

    def loss(self, loss: Loss) -> Loss:
        """`loss` of the U-Net's params, as `objectives.text_to_image_loss`, seen as one of the vectors.

        frozen: what `loss` takes and "unet", its params. All but the vectors stays as it is.
        """

        def over_vectors(params, frozen, batch, key):
            rest = {**frozen, **self._with_rows(frozen, params)}
            return loss(rest.pop("unet"), rest, batch, key)

        return over_vectors

    def parts(self, model: Model, params: Params) -> dict[str, Params]:
        """The params of the parts of a model that the word is in."""
        return self._with_rows({kind: part.params for kind, part in model.parts.items()}, params)

    def _with_rows(self, weights: Mapping[str, Any], params: Params) -> dict[str, Params]:
        """Text encoders' params, of `weights`, with the vectors in their tables."""
        return {
            own.kind: embeddings.with_rows(weights[own.kind], own.ids, params[NAMES[own.kind]])
            for own in self.every
        }

    def embedding(self, params: Params) -> embeddings.Embedding:
        """What is saved of it."""
        vectors = [np.asarray(params[NAMES[own.kind]], np.float32) for own in self.every]
        return embeddings.Embedding(self.config.placeholder, *vectors)

    def captions(self) -> dict[str, Any]:
        """How `sources.training_batches` treats captions, as its arguments."""
        if not self.config.templates:
            return {"accept": self._with_placeholder}
        if jax.process_index() == 0:
            count, first = len(self.config.templates), self._told(0)
            print(
                f"captions: {count} templates, such as {first!r}, not those of the data",
                flush=True,
            )
        return {"accept": lambda caption: caption or "", "reword": self._drawn}

    def _with_placeholder(self, caption: str | None) -> str:
        """The caption itself, if the model reads all of the placeholder in it; Unusable if not."""
        if caption is None or not self.words.read_in(caption):
            word = self.config.placeholder
            raise Unusable(f"no {word} in what is read of its caption; write it, or inversion.templates")
        return caption

    def _drawn(self, captions: Sequence[str], step: int, first_place: int) -> list[str]:
        """A template for each caption, drawn for (seed, step, place in the batch)."""
        places = range(first_place, first_place + len(captions))
        seeds = (np.random.SeedSequence(self.seed, spawn_key=(step, place)) for place in places)
        count = len(self.config.templates)
        return [self._told(int(np.random.default_rng(seed).integers(count))) for seed in seeds]

    def _told(self, i: int) -> str:
        return self.config.templates[i].replace("{}", self.config.placeholder)


def begin(model: Model, config: InversionConfig, seed: int) -> tuple[Model, Inversion]:
    """The model with the placeholder among its words, which means what the initializer does.

    Raises:
      UserError: the placeholder is a word already, the initializer not one token, or a template too long.
    """
    every = tuple(_begun(*reader, config, kind) for kind, reader in model.readers.items())
    for template in (*config.templates, "{}"):
        if not every[0].read_in(template.replace("{}", config.placeholder)):
            raise UserError(
                f"inversion.num_vectors={config.num_vectors}: {template!r} is then too long for this model, "
                f"which reads {model.first_tokenizer.model_max_length - 2} tokens; write less, or shorter "
                "templates"
            )
    for own in every:
        part = model.parts[own.kind]
        flat = traverse_util.flatten_dict(part.params)
        flat[embeddings.TABLE] = own.table(flat[embeddings.TABLE])
        part = dataclasses.replace(part, params=traverse_util.unflatten_dict(flat))
        model = with_words(dataclasses.replace(model, **{own.kind: part}), own)
    return model, Inversion(config, seed, every)


def _begun(part: Component, tokenizer: Tokenizer, config: InversionConfig, kind: str) -> embeddings.Words:
    """The placeholder for one text encoder, with the vector of the initializer."""
    pieces = tokenizer.pieces(config.initializer)
    if len(pieces) != 1:
        spelt = " + ".join(piece.removesuffix("</w>") for _, piece in pieces)
        raise UserError(
            f"inversion.initializer={config.initializer!r} is {len(pieces)} tokens of this model ({spelt}): "
            "write a word that is one, such as 'dog'"
        )
    try:
        tokenizer, ids = tokenizer.with_token(config.placeholder, config.num_vectors)
    except UserError as error:
        raise UserError(
            f"inversion.placeholder={config.placeholder!r}: {error}; write another, such as '<my-thing>'"
        ) from None
    table = np.asarray(traverse_util.flatten_dict(part.params)[embeddings.TABLE])
    return embeddings.Words(tokenizer, ids, np.repeat(table[[pieces[0][0]]], len(ids), 0), kind)
