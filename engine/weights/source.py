"""Where a model was read from, so that it can be read again with other LoRAs, or another that is built alike.

What is compiled of a model takes its params as arguments, so that the two share it.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.types import UserError
from engine.weights.component import Component
from engine.weights.folder import Model, read_outline

Loras = Sequence[tuple[str | os.PathLike, float]]  # files and scales
NOT_BUILT = "sample_size"  # a size to draw by default, in a config that says how a network is built


class Source(NamedTuple):
    """That of a model."""

    folder: Path
    # A model as this one was read: LoRAs, its folder, and an autoencoder that is in memory already
    read: Callable[[Loras, Path, Component | None], Model]
    own_decoder: bool  # whether the autoencoder is that of the folder

    def again(self, loras: Loras, model: Model) -> Model:
        """The model with other LoRAs.

        Raises:
          UserError: a file is no LoRA of it, or the folder holds another model now.
        """
        return self._still(model, self.read(loras, self.folder, model.vae))

    def another(self, folder: Path, loras: Loras, model: Model) -> Model:
        """Another model that is built as `model` is. That is found out before its weights are read.

        Raises:
          UserError: no such folder, one that holds no model, or one that is built otherwise.
        """
        theirs, ours = (read_outline(each).configs for each in (folder, self.folder))
        if why := different(theirs, ours):
            raise UserError(f"{folder} is built otherwise than {self.folder}: {why}; load it by itself")
        return self._still(model, self.read(loras, folder, None if self.own_decoder else model.vae))

    def _still(self, model: Model, found: Model) -> Model:
        """What was found, if it is built as the model in memory is."""
        theirs, ours = ({kind: part.config for kind, part in each.parts.items()} for each in (found, model))
        if different(theirs, ours):
            raise UserError(f"{self.folder} is another model now than when it was loaded")
        return found


def different(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """How a model is built otherwise than another, in a few words; "": it is built alike.

    Args:
      ours, theirs: the configs of their networks.
    """
    for kind in {**ours, **theirs}:
        if kind not in theirs or kind not in ours:
            return f"it has {'a' if kind in ours else 'no'} {kind}"
    for kind, a in ours.items():
        b = theirs[kind]
        if type(a) is not type(b):
            return f"its {kind} is of another class"
        for field in dataclasses.fields(a):
            pair = getattr(a, field.name), getattr(b, field.name)
            if pair[0] != pair[1] and field.name != NOT_BUILT:
                return f"its {kind} has {field.name}={pair[0]}, not {pair[1]}"
    return ""
