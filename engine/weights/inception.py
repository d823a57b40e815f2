"""The weights of FID's network, from one safetensors file with the keys of torch-fidelity and pytorch-fid."""

from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from flax import nnx, traverse_util

from engine.models.inception import InceptionV3
from engine.models.layers import outline
from engine.types import Params
from engine.weights.component import Place, match, read_params
from engine.weights.files import find_weights
from engine.weights.safetensors_io import read_header

KIND = "inception"
CHECKPOINT = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes it


class Network(NamedTuple):
    """`nnx.merge(graphdef, nnx.State(params))` is the module."""

    graphdef: nnx.GraphDef
    params: Params


def find(path: str | Path) -> Path:
    """The file at `path`; UserError where there is none, or one that is never opened."""
    return find_weights(path, "weights", f"from torch-fidelity's {CHECKPOINT}")


def load_inception(path: str | Path, place: Place | None = None) -> Network:
    """Reads FID's network, in float32.

    Args:
      path: a .safetensors file. The keys of the classes and of the training are left unread.
      place: as in `component.load_component`; the names begin with "inception.".

    Raises:
      UserError: no such file, a pickle, a broken file, or another network; all wrong keys in one line.
    """
    path = find(path)
    graphdef, state = nnx.split(outline(InceptionV3), nnx.Param)
    shapes = MappingProxyType(traverse_util.flatten_dict(nnx.to_pure_dict(state)))
    misfit = f"{path} does not hold the InceptionV3 of FID (torch-fidelity's {CHECKPOINT})"
    sources = match(KIND, shapes, {path: read_header(path)}, misfit)
    return Network(graphdef, read_params(KIND, shapes, sources, np.dtype(np.float32), place))
