"""What the text encoders of a model say of prompts: once for each that differs."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from engine import conditions
from engine.parallel import Devices, pad
from engine.parts import computed
from engine.requests import Context
from engine.text.reading import PLAIN, Reading
from engine.weights.folder import Model


class Texts:
    """Of one model. The program is compiled when it is first needed, and kept."""

    def __init__(self, model: Model, devices: Devices, reading: Reading = PLAIN):
        self.reading = reading  # of prompts
        self._model, self._devices = model.bare, devices
        self.program = devices.map(copy.copy(self)._encode)  # which outlives this model's params
        self._know(model)

    def of(self, model: Model) -> "Texts":
        """The same, compiled as it is, for a model that is built alike. Its tokenizers may be others."""
        other = copy.copy(self)
        other._know(model)
        return other

    def _know(self, model: Model) -> None:
        self._model, reading = model, self.reading
        self._count = functools.lru_cache(1024)(
            lambda prompt: len(conditions.parts_of(model, prompt, reading))
        )

    def encode(self, prompts: Sequence[str], size: int) -> dict[str, Context]:
        """What the text encoders say of each of some prompts; what they read goes in batches of `size`."""
        read = {prompt: conditions.parts_of(self._model, prompt, self.reading) for prompt in prompts}
        parts = [part for each in read.values() for part in each]
        parts += [conditions.empty(part) for part in parts if conditions.has_weights(part)]
        contexts = self._said(list(dict.fromkeys(map(conditions.key_of, parts))), size)
        return {prompt: conditions.joined(self._model, each, contexts) for prompt, each in read.items()}

    def blank(self, size: int) -> Context:
        """What `encode` gives of a prompt in batches of `size`, of zeros: nothing is computed."""
        ids, params = conditions.ids_of(self._model, [""] * size), conditions.params_of(self._model)
        found = self.program.eval_shape(params, self._devices.shard_batch(ids))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), found)

    def length(self, prompt: str, negative_prompt: str, guidance_scale: float) -> int:
        """In how many parts the two are read, the longer one if both are."""
        away = conditions.steered_away(self._model, guidance_scale)
        return max(map(self._count, (prompt, negative_prompt) if away else (prompt,)))

    def _said(self, keys: Sequence[conditions.Key], size: int) -> dict[conditions.Key, Context]:
        """What the text encoders say of each of some different parts of prompts."""
        ids, params = conditions.filled(self._model, keys), conditions.params_of(self._model)
        found = {}
        for first in range(0, len(keys), size):
            rows = {kind: pad(each[first : first + size], size) for kind, each in ids.items()}
            batch = self._devices.fetch(self.program(params, self._devices.shard_batch(rows)))
            for i, key in enumerate(keys[first : first + size]):
                found[key] = jax.tree.map(lambda array, i=i: array[i], batch)
        return found

    def _encode(self, params: Any, ids: Any) -> Context:
        """The program: ids -> what is said, (params, batched) -> batched."""
        params = self._devices.whole(computed(params, self._devices))
        return conditions.encoded(self._model.graphdefs, params, ids, self._model.clip_skip)
