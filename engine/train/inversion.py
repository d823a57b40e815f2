"""Textual inversion (Gal et al. 2022): a model's loss becomes one over the vectors of a new word."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from engine.config import InversionConfig
from engine.pixels import Unusable
from engine.train.step import Loss
from engine.types import Params, UserError
from engine.weights import embeddings
from engine.weights.folder import Model, with_words


@dataclasses.dataclass(frozen=True)
class Inversion:
    """A word in training. Its params are {"embedding": (N, D)}."""

    config: InversionConfig
    seed: int  # of the templates that are drawn
    words: embeddings.Words  # as it begins

    @property
    def params(self) -> Params:
        """As the training begins."""
        return {"embedding": self.words.vectors}

    def loss(self, loss: Loss) -> Loss:
        """`loss` of the U-Net's params, as `objectives.text_to_image_loss`, seen as one of the vectors.

        frozen: what `loss` takes and "unet", its params. All but the vectors stays as it is.
        """

        def over_vectors(params, frozen, batch, key):
            text_encoder = embeddings.with_rows(frozen["text_encoder"], self.words.ids, params["embedding"])
            rest = {**frozen, "text_encoder": text_encoder}
            return loss(rest.pop("unet"), rest, batch, key)

        return over_vectors

    def parts(self, model: Model, params: Params) -> dict[str, Params]:
        """The params of the parts of a model that the word is in."""
        own = model.text_encoder.params
        return {"text_encoder": embeddings.with_rows(own, self.words.ids, params["embedding"])}

    def embedding(self, params: Params) -> embeddings.Embedding:
        """What is saved of it."""
        return embeddings.Embedding(self.config.placeholder, np.asarray(params["embedding"], np.float32))

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
    pieces = model.tokenizer.pieces(config.initializer)
    if len(pieces) != 1:
        spelt = " + ".join(piece.removesuffix("</w>") for _, piece in pieces)
        raise UserError(
            f"inversion.initializer={config.initializer!r} is {len(pieces)} tokens of this model ({spelt}): "
            "write a word that is one, such as 'dog'"
        )
    try:
        tokenizer, ids = model.tokenizer.with_token(config.placeholder, config.num_vectors)
    except UserError as error:
        raise UserError(
            f"inversion.placeholder={config.placeholder!r}: {error}; write another, such as '<my-thing>'"
        ) from None
    flat = traverse_util.flatten_dict(model.text_encoder.params)
    table = np.asarray(flat[embeddings.TABLE])
    words = embeddings.Words(tokenizer, ids, np.repeat(table[[pieces[0][0]]], len(ids), 0))
    for template in (*config.templates, "{}"):
        if not words.read_in(template.replace("{}", config.placeholder)):
            raise UserError(
                f"inversion.num_vectors={config.num_vectors}: {template!r} is then too long for this model, "
                f"which reads {tokenizer.model_max_length - 2} tokens; write less, or shorter templates"
            )
    flat[embeddings.TABLE] = words.table(table)
    text_encoder = dataclasses.replace(model.text_encoder, params=traverse_util.unflatten_dict(flat))
    model = with_words(dataclasses.replace(model, text_encoder=text_encoder), words)
    return model, Inversion(config, seed, words)
