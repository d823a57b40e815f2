"""A network that is one safetensors file: the shapes of its weights tell all of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from engine.models.layers import outline
from engine.types import Params
from engine.weights import names
from engine.weights.component import Place, Sources, match, read_params
from engine.weights.safetensors_io import Tensor

Shapes = Mapping[names.Path, Any]
Build = Callable[[nnx.Rngs], nnx.Module]


class Network(NamedTuple):
    """`nnx.merge(graphdef, nnx.State(params))` is the module."""

    config: Any
    graphdef: nnx.GraphDef
    params: Params


class Found(NamedTuple):
    """A network in a file, of which nothing but the header was read."""

    kind: str  # with which the names of its parameters begin for `Place`, and by which `names` knows keys
    file: Path
    config: Any
    graphdef: nnx.GraphDef
    shapes: Shapes
    sources: Sources


def abstract(build: Build) -> tuple[nnx.GraphDef, Shapes]:
    """A network without weights: the module's graph, and the shape of each parameter."""
    graphdef, state = nnx.split(outline(build), nnx.Param)
    return graphdef, MappingProxyType(traverse_util.flatten_dict(nnx.to_pure_dict(state)))


def found(
    kind: str, path: Path, header: Mapping[str, Tensor], config: Any, build: Build, misfit: str
) -> Found:
    """The network that a file with this header holds.

    Raises:
      UserError: the weights are those of another; all wrong keys in one line, which begins with `misfit`.
    """
    graphdef, shapes = abstract(build)
    return Found(kind, path, config, graphdef, shapes, match(kind, shapes, {path: header}, misfit))


def load(found: Found, dtype: DTypeLike = np.float32, place: Place | None = None) -> Network:
    """Reads the weights; `dtype` and `place` as in `load_component`."""
    params = read_params(found.kind, found.shapes, found.sources, np.dtype(dtype), place)
    return Network(found.config, found.graphdef, params)
