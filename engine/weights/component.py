"""One model (unet/, vae/, text_encoder/, a CLIP): config.json and safetensors <-> config and params.

A model is built without memory (`nnx.eval_shape`), and its parameters are filled in as they are read, cast
and placed, a few at a time: the peak is the model plus its largest tensors.
"""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from engine.config import to_json
from engine.models.layers import outline
from engine.types import Params, UserError
from engine.weights import names
from engine.weights.arrays import Scratch, cast
from engine.weights.files import PICKLES, new_folder, read_json, write_json
from engine.weights.kinds import KNOWN
from engine.weights.safetensors_io import (
    DTYPES,
    Tensor,
    as_dtype,
    read_header,
    read_tensor,
    write,
)

MAX_SHARD_SIZE = 5 * 10**9  # bytes
READERS = 8  # threads at most, each with a tensor of its own

# ("unet.down_blocks.0.resnets.0.conv1.kernel", array) -> the same on a device or on many
Place = Callable[[str, np.ndarray], Any]
Change = Callable[[str, np.ndarray], np.ndarray]  # the same, on the host: an array to take its place
# file -> path of a parameter -> the key under which the file has it, and where
Sources = dict[Path, dict[names.Path, tuple[str, Tensor]]]


@dataclasses.dataclass(frozen=True)
class Component:
    """A model as data: `nnx.merge(graphdef, nnx.State(params))` is the module."""

    kind: str  # a key of KNOWN
    config: Any
    graphdef: nnx.GraphDef
    params: Params


@functools.lru_cache(maxsize=8)
def abstract(kind: str, config: Any) -> tuple[nnx.GraphDef, Mapping[names.Path, jax.ShapeDtypeStruct]]:
    """The structure of a model and the shape of each parameter, without allocating any."""
    model = outline(lambda rngs: KNOWN[kind].of(config).module(config, rngs))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, MappingProxyType(traverse_util.flatten_dict(nnx.to_pure_dict(params)))


def load_component(
    folder: str | Path,
    kind: str,
    dtype: DTypeLike = jnp.float32,
    variant: str | None = None,
    place: Place | None = None,
    changes: Sequence[Change] = (),
) -> Component:
    """Reads one model.

    Args:
      folder: with config.json and the weights, as one safetensors file or several with an index.
      kind: a key of KNOWN: "unet", "vae", "text_encoder", ...
      dtype: float32, float16 or bfloat16; the files may hold any of the three.
      variant: "fp16" for the files *.fp16.safetensors. None takes the plain ones, or those of fp16 where
        there are no others.
      place: puts a host array on its device or devices; called with "kind.path.of.the.parameter" and the
        array in Flax's layout, from several threads. None: the default device.
      changes: called with the same before the cast, in the type of the file, one on what another gives.

    Raises:
      UserError: anything missing, broken, unexpected or of another shape; all such keys in one line.
    """
    return outlined(folder, kind, dtype, variant, place, changes)()


def outlined(
    folder: str | Path,
    kind: str,
    dtype: DTypeLike = jnp.float32,
    variant: str | None = None,
    place: Place | None = None,
    changes: Sequence[Change] = (),
) -> Callable[[], Component]:
    """`load_component` in two: all that can be missing or of another shape is told now, and what it gives
    reads the model. That is no work of Python's, so that another can be outlined beside it.
    """
    folder, dtype = Path(folder), as_dtype(dtype)
    config = read_config(folder / "config.json", kind)
    graphdef, shapes = abstract(kind, config)
    sources = find_sources(folder, kind, config, variant)

    def read() -> Component:
        return Component(kind, config, graphdef, read_params(kind, shapes, sources, dtype, place, changes))

    return read


def find_sources(folder: Path, kind: str, config: Any, variant: str | None = None) -> Sources:
    """Where a folder has each parameter of the model with this config; UserError as of `load_component`."""
    weights = find_weights(folder, KNOWN[kind].stem, variant)
    misfit = f"{weights} does not fit {folder / 'config.json'}"
    return match(kind, abstract(kind, config)[1], read_headers(weights), misfit)


def read_params(
    kind: str,
    shapes: Mapping[names.Path, jax.ShapeDtypeStruct],
    sources: Sources,
    dtype: np.dtype,
    place: Place | None = None,
    changes: Sequence[Change] = (),
) -> Params:
    """Reads the parameters that `match` found, some at a time; the rest is as in `load_component`.

    Their axes and types are changed on the host, by a thread each: that takes some times as long as reading.
    """
    scratch = Scratch()

    def read(file: Path, path: names.Path, stored: str, tensor: Tensor) -> Any:
        with open(file, "rb") as opened:
            found = read_tensor(opened, stored, tensor, scratch)
        array = names.to_flax(path, found, len(shapes[path].shape))
        name = ".".join(map(str, (kind, *path)))
        for change in changes:
            array = change(name, array)
        array = scratch.kept(cast(array, dtype, f"{file}: {stored}"))
        leaf = (place or _on_default_device)(name, array)
        return jax.block_until_ready(leaf)  # or the transfers in flight would pile up

    wanted = [(file, path, *found) for file, tensors in sources.items() for path, found in tensors.items()]
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        leaves = list(pool.map(lambda each: read(*each), wanted))
    paths = (path for _, path, *_ in wanted)
    return traverse_util.unflatten_dict(dict(zip(paths, leaves, strict=True)))


def _on_default_device(name: str, array: np.ndarray) -> jax.Array:
    return jax.device_put(array)


def read_config(path: Path, kind: str) -> Any:
    """The config of a model; UserError, with the file, where it is not one that the engine can build."""
    options = read_json(path)
    known, architectures = KNOWN[kind].class_names, options.get("architectures")
    said = architectures[0] if isinstance(architectures, list) and architectures else known[0]
    written = options.get("_class_name", said)  # that of diffusers, or of transformers
    if written not in known:
        raise UserError(f"{path} describes a {written}; the engine reads {' or '.join(known)}")
    try:
        return KNOWN[kind].named(written).config.from_json(options, str(path))
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"{path}: {message}") from None


def find_weights(folder: Path, stem: str, variant: str | None) -> Path:
    """The safetensors file or the index of its shards; UserError where there is none."""
    candidates = []
    for infix in (f".{variant}",) if variant else ("", ".fp16"):
        candidates += [f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"]
    for name in candidates:
        if (folder / name).exists():
            return folder / name
    present = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in present if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in present):
        raise UserError(
            f"{folder} holds weights as {pickles[0]} alone, a format that is never opened because it can run "
            "code: convert it with PyTorch diffusers or transformers, "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(
        f"{folder} has no {' or '.join(candidates)}; it holds {', '.join(present[:20]) or 'nothing'}"
    )


def read_headers(weights: Path) -> dict[Path, dict[str, Tensor]]:
    """File -> its tensors, for one file or for all shards of an index."""
    if weights.suffix != ".json":
        return {weights: read_header(weights)}
    shards = read_json(weights).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
        raise UserError(f"{weights} has no weight_map of tensor names to files")
    for shard in shards.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{weights} names {shard!r}, which is not a safetensors file beside it")
    headers = {
        file: read_header(file) for file in sorted({weights.parent / name for name in shards.values()})
    }
    for file, header in headers.items():
        differing = header.keys() ^ {key for key, shard in shards.items() if shard == file.name}
        if differing:
            raise UserError(f"{weights} and {file.name} disagree on {listed(sorted(differing))}")
    return headers


def match(
    kind: str,
    shapes: Mapping[names.Path, jax.ShapeDtypeStruct],
    headers: Mapping[Path, Mapping[str, Tensor]],
    misfit: str,
) -> Sources:
    """Where each parameter is stored. Raises UserError unless all fits exactly.

    Args:
      kind: whose other names `names.canonical` knows.
      misfit: how the message begins: "FILE does not fit ..."
    """
    paths, unexpected, twice, misshapen, mistyped = names.keys(shapes), [], [], [], []
    missing, sources = dict(paths), {}
    for file, header in headers.items():
        sources[file] = {}
        for stored, tensor in header.items():
            key = names.canonical(kind, stored)
            if key is None:
                continue
            if key not in paths:
                unexpected.append(stored)
                continue
            path = paths[key]
            wanted = names.torch_shape(path, shapes[path].shape)
            if missing.pop(key, None) is None:
                twice.append(stored)
            if not names.fits(kind, key, tensor.shape, wanted):
                misshapen.append(f"{stored} is {tensor.shape}, not {wanted}")
            if tensor.code not in DTYPES:
                mistyped.append(f"{stored} is {tensor.code}")
            sources[file][path] = (stored, tensor)
    faults = {
        "missing": list(missing),
        "unexpected": unexpected,
        "wrong shape": misshapen,
        f"no type of {', '.join(DTYPES)}": mistyped,
        "given twice": twice,
    }
    if any(faults.values()):
        told = "; ".join(f"{fault}: {listed(keys)}" for fault, keys in faults.items() if keys)
        raise UserError(f"{misfit}: {told}")
    return sources


def listed(keys: list[str], limit: int = 20) -> str:
    """How many keys, and their names, the first `limit` of them."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"({len(keys)}) {', '.join(keys[:limit])}{more}"


def save_component(
    folder: str | Path,
    component: Component,
    dtype: DTypeLike | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Writes one model so that PyTorch's diffusers or transformers load it; the folder appears whole.

    Args:
      dtype: cast to this; None keeps each parameter as it is.
      max_shard_size: bytes; what is larger is split into several files with an index.
      overwrite: replace a folder that holds a model.

    Raises:
      UserError: the folder exists, or a value does not fit into float16.
    """
    with new_folder(Path(folder), "config.json", overwrite) as new:
        write_component(new, component, dtype, max_shard_size)


def write_component(
    folder: Path, component: Component, dtype: DTypeLike | None, max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """`save_component` into an empty folder that exists."""
    _, shapes = abstract(component.kind, component.config)
    leaves = traverse_util.flatten_dict(component.params)
    if leaves.keys() != shapes.keys():
        differing = sorted(".".join(map(str, path)) for path in leaves.keys() ^ shapes.keys())
        raise ValueError(f"params and config of the {component.kind} disagree on {listed(differing)}")
    paths = names.keys(shapes)

    def tensor(key: str) -> np.ndarray:
        array = _on_host(leaves[paths[key]])
        return cast(names.to_torch(paths[key], array), dtypes[key], f"{component.kind}: {key}")

    dtypes = {key: as_dtype(dtype or leaves[path].dtype) for key, path in paths.items()}
    write_config(folder, component.kind, component.config)
    write_weights(folder, component.kind, shapes, dtypes, tensor, max_shard_size)


def _on_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        leaf = leaf.addressable_data(
            0
        )  # a jax.Array keeps its host copy while it lives; this one is short-lived
    return np.asarray(leaf)


def write_config(folder: Path, kind: str, config: Any) -> None:
    """config.json, as the library of the component writes it."""
    written = KNOWN[kind].of(config)
    options = to_json(config, written.class_name)
    del options["_class_name"]
    write_json(folder / "config.json", written.notes() | options)


def write_weights(
    folder: Path,
    kind: str,
    shapes: Mapping[names.Path, jax.ShapeDtypeStruct],
    dtypes: Mapping[str, np.dtype],
    tensor: Callable[[str], np.ndarray],
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """One file, or shards and their index, of what `tensor` gives for each key (in PyTorch's layout)."""
    stem = KNOWN[kind].stem
    torch_shapes = {names.to_key(path): names.torch_shape(path, leaf.shape) for path, leaf in shapes.items()}
    sizes = {key: math.prod(shape) * dtypes[key].itemsize for key, shape in torch_shapes.items()}
    shards = _split(sizes, max_shard_size)
    if len(shards) == 1:
        write(folder / f"{stem}.safetensors", torch_shapes, dtypes, tensor)
        return
    weight_map = {}
    for number, keys in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write(folder / name, {key: torch_shapes[key] for key in keys}, dtypes, tensor)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Neighbours together, up to `limit` bytes; a tensor larger than that is alone."""
    shards: list[list[str]] = [[]]
    room = limit
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    return shards


def digest_of(params: Params) -> str:
    """sha256 of the numbers of a tree of params, leaf by leaf."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
