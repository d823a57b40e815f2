"""Training steps that are the same are traced and compiled once: most of the time of a tiny training.

The same is what computes the same: the code of the loss and of the optimizer, and all values that they close
over, down to the last. Where a run that goes on would build another step than the one before, it has its own.
"""

import contextlib
import dataclasses
import functools
import re
import types
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from engine.config import StageConfig
from engine.train import dry_run, loop
from engine.train.step import itself

CHECKS = re.compile("jaxtyping|beartype")
BY_VALUE = (int, float, complex, str, bytes, type(None), type, types.CodeType, types.ModuleType, nnx.GraphDef)


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Within, `loop.program` hands out again what it has built for the same step."""
    build, built = loop.program, {}

    def program(name, loss, params, optimizer, config, chips=None, around=itself):
        arguments = (
            loss,
            optimizer,
            config,
            chips,
            around,
            jax.tree.map(lambda x: (x.shape, x.dtype), params),
        )
        key = meaning(arguments)
        if key not in built:  # the arguments stay alive, so that no other thing comes to have their id
            built[key] = build(name, loss, params, optimizer, config, chips, around), arguments
        return built[key][0]

    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, dry_run):
            patch.setattr(module, "program", program)
        yield


def meaning(thing: Any) -> Hashable:
    """Equal for things that compute the same; what it does not know is like itself alone."""
    if isinstance(thing, BY_VALUE):
        return type(thing), thing
    if isinstance(thing, types.FunctionType):
        while CHECKS.search(thing.__code__.co_filename):  # of annotations, made anew each time
            thing = thing.__wrapped__
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        return thing.__code__, meaning(cells), meaning(thing.__defaults__), meaning(thing.__kwdefaults__)
    if isinstance(thing, functools.partial):
        return functools.partial, meaning((thing.func, thing.args, thing.keywords))
    if isinstance(thing, (list, tuple)):
        return type(thing), tuple(map(meaning, thing))
    if isinstance(thing, dict):
        return dict, tuple((key, meaning(value)) for key, value in thing.items())
    if isinstance(thing, (np.ndarray, np.generic, jax.Array)) and thing.dtype != object:
        array = np.asarray(thing)
        return type(thing), array.dtype.str, array.shape, array.tobytes()
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
        if isinstance(thing, StageConfig):
            names.remove("steps")  # no step knows how many there are: the optimizer's rates tell it
        return type(thing), meaning([getattr(thing, name) for name in names])
    return id(thing)
