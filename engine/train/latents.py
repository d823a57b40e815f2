"""Pictures as latents and captions as contexts, computed once: a folder of safetensors that training reads.

    00-00000.safetensors   of pictures of one shape: mean, logvar (N, h, w, C) and context (N, L, D), float16;
                           of SDXL also pooled (N, P) and sizes (N, 6), float32
    empty.safetensors      context (1, L, D) of no caption at all, and pooled (1, P)
    cache.json             written last: what it was made of

The autoencoder and the text encoder do not train with the U-Net; without them a step has no more to do than
the U-Net itself. What is drawn anew in every epoch is lost: crops are central, nothing is mirrored, captions
keep their order, and a batch trains on the posterior's mean, as `text_to_image_loss` does.
"""

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from engine import conditions
from engine.parallel import Devices
from engine.train.buckets import Order
from engine.train.data import Batch, BatchAt, own_rows
from engine.train.objectives import applier, to_float
from engine.train.sources import PictureBatches
from engine.types import UserError
from engine.weights.arrays import cast
from engine.weights.component import digest_of
from engine.weights.files import read_json, write_json
from engine.weights.folder import Model
from engine.weights.safetensors_io import DTYPES, read_header, write

SHARD = 512  # pictures in a file; some 100 MB of Stable Diffusion's
FLOAT16 = np.dtype(np.float16)
MARKER, EMPTY = "cache.json", "empty.safetensors"
NAMES = ("context", "pooled")  # what the text encoders say

Arrays = dict[str, np.ndarray]
Encode = Callable[[np.ndarray, list[str]], Arrays]  # pictures and captions


class Shard(NamedTuple):
    name: str
    bucket: int
    numbers: np.ndarray  # of its pictures


def write_cache(
    model: Model,
    pictures: PictureBatches,
    folder: pathlib.Path,
    batch_size: int,
    report: Callable[[int, int], None] = lambda done, whole: None,
) -> None:
    """Encodes all pictures, each once. Files that are there already, from before a stop, are kept.

    Args:
      batch_size: pictures that a device encodes at once.
      report: called with how many pictures are done, of how many.

    Raises:
      UserError: the folder holds a cache of other pictures or of another model; or a shape of theirs does not
        suit the autoencoder.
    """
    scale = model.vae.config.scale
    if any(side % scale for shape in pictures.shapes for side in shape):
        raise UserError(f"this autoencoder takes multiples of {scale}: write another size or multiple")
    about = {"fingerprint": pictures.fingerprint, "model": _made_by(model)}
    begun = folder / f".{MARKER}"
    for file in (folder / MARKER, begun):
        if file.exists() and any(read_json(file).get(name) != value for name, value in about.items()):
            raise UserError(
                f"{folder} holds other pictures, or those of another model or clip_skip: write another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(begun, about)
    encode = _encoder(model, batch_size)
    done = 0
    for shard in _shards(pictures):
        if not (folder / shard.name).exists():
            _write(folder / shard.name, _encoded(pictures, shard, encode, batch_size))
        done += len(shard.numbers)
        report(done, pictures.usable)
    nothing = encode(np.zeros((1, *pictures.shapes[0][::-1], 3), np.uint8), [""])
    _write(folder / EMPTY, {name: nothing[name] for name in NAMES if name in nothing})
    write_json(begun, {**about, "scaling_factor": model.vae.config.scaling_factor})
    begun.replace(folder / MARKER)


def _shards(pictures: PictureBatches) -> Iterator[Shard]:
    for bucket in range(len(pictures.shapes)):
        numbers = pictures.numbers(bucket)
        for place in range(0, len(numbers), SHARD):
            name = f"{bucket:02}-{place // SHARD:05}.safetensors"
            yield Shard(name, bucket, numbers[place : place + SHARD])


def _encoded(pictures: PictureBatches, shard: Shard, encode: Encode, batch_size: int) -> Arrays:
    parts = []
    for place in range(0, len(shard.numbers), batch_size):
        images, captions, sizes, _ = pictures.whole(shard.bucket, shard.numbers[place : place + batch_size])
        if captions:  # or all of them are damaged
            found = encode(images, captions)
            parts.append(found | {"sizes": np.float32(sizes)} if "pooled" in found else found)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _encoder(model: Model, batch_size: int) -> Encode:
    """uint8 (B, H, W, 3) and B captions -> arrays of float16, on all devices; B is at most batch_size."""
    devices, build_vae, readers = Devices(), applier(model.vae.graphdef), list(model.readers)
    params = devices.share({kind: model.parts[kind].params for kind in ("vae", *readers)})
    batch_size += -batch_size % devices.count

    @devices.map
    def run(params: Any, batch: Any) -> Any:
        posterior = build_vae(params["vae"]).encode(to_float(batch["image"]))
        context = conditions.encoded(model.graphdefs, params, batch["ids"], model.clip_skip)
        found = {"mean": posterior.mean, "logvar": posterior.logvar, "context": context.words}
        return found if context.pooled is None else found | {"pooled": context.pooled}

    def encode(images: np.ndarray, captions: list[str]) -> Arrays:
        rows = np.minimum(np.arange(batch_size), len(images) - 1)  # one size, so that one program will do
        ids = {kind: each[rows] for kind, each in conditions.ids_of(model, captions).items()}
        results = devices.fetch(run(params, devices.shard_batch({"image": images[rows], "ids": ids})))
        return {
            name: cast(np.asarray(x, np.float32), FLOAT16, name)[: len(images)] for name, x in results.items()
        }

    return encode


def _write(path: pathlib.Path, arrays: Arrays) -> None:
    unfinished = path.with_name(f".{path.name}.part")
    shapes = {name: array.shape for name, array in arrays.items()}
    dtypes = {name: array.dtype for name, array in arrays.items()}
    write(unfinished, shapes, dtypes, arrays.__getitem__)
    os.replace(unfinished, path)


def _made_by(model: Model) -> str:
    """Tells apart the networks that make the arrays."""
    digest = digest_of({kind: model.parts[kind].params for kind in ("vae", *model.readers)})
    return f"{digest}, clip_skip {model.clip_skip}" if model.clip_skip else digest


def cached_batches(
    folder: pathlib.Path, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> BatchAt:
    """step -> {"mean", "logvar": (B / processes, h, w, C), "context": (B / processes, L, D)}, float16.

    Of SDXL also "pooled": (B / processes, P), and "sizes": (B / processes, 6), float32.

    The pictures come in the order in which `training_batches` gives them with the same seed, unless some were
    damaged or repeated; process, processes as there.

    Raises:
      UserError: the folder holds no whole cache.
    """
    _whole(folder)
    first_row, share = own_rows(batch_size, process, processes)
    paths = sorted(folder.glob("[0-9]*.safetensors"))
    shards = [_mapped(path) for path in paths]
    counts = [len(shard.get("mean", ())) for shard in shards]  # none, where all were damaged
    places = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    if not places:
        raise UserError(f"{folder} holds no pictures")
    held = sorted(shards[places[0][0]])
    names = [paths[shard].name.split("-")[0] for shard, _ in places]
    order = Order(np.unique(names, return_inverse=True)[1], batch_size, seed)

    def batch_at(step: int) -> Batch:
        bucket, start = order.batch(step)
        first = start + first_row
        chosen = [places[order.picture(bucket, first + row)[0]] for row in range(share)]
        return {name: np.stack([shards[shard][name][row] for shard, row in chosen]) for name in held}

    return batch_at


def empty(folder: pathlib.Path, model: Model) -> Arrays:
    """What stands for no caption: "context" (L, D), and of SDXL "pooled" (P,); float32.

    Raises:
      UserError: the folder holds no whole cache, or one that another model made.
    """
    if _whole(folder)["model"] != _made_by(model):
        skip = f" --clip_skip {model.clip_skip}" if model.clip_skip else ""
        raise UserError(
            f"{folder} was made with another autoencoder or text encoder, or another clip_skip: "
            f"write a new one with python -m launch.cache --model FOLDER{skip}"
        )
    found = {name: np.float32(x[0]) for name, x in _mapped(folder / EMPTY).items()}
    return {name: np.zeros_like(x) for name, x in found.items()} if model.zeros else found


def _whole(folder: pathlib.Path) -> dict[str, Any]:
    """What a cache was made of; UserError where it is not whole."""
    if not (folder / MARKER).exists():
        raise UserError(
            f"{folder} holds no whole cache: write one with python -m launch.cache --out {folder}"
        )
    return read_json(folder / MARKER)


def _mapped(path: pathlib.Path) -> Arrays:
    """The arrays of a file, which stay on the disk."""
    header = read_header(path)
    return {
        name: np.memmap(path, DTYPES[tensor.code], "r", tensor.start, tensor.shape)
        for name, tensor in header.items()
    }
