"""Drawn pictures whose latents are kept: a U-Net learns from each of them several times, in other words.

On a host that draws and encodes as slowly as it trains (a few CPU cores), a picture that is seen again costs
half of a fresh one. The latents of `STEPS` batches are one safetensors file, written when the first of them
is asked for, whole or not at all; a run that goes on reads what is there.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from engine.config import TrainConfig
from engine.parallel import Devices
from engine.text.tokenizer import Tokenizer
from engine.train.data import BatchAt, easy_share, own_rows
from engine.train.objectives import applier, to_float
from engine.weights.arrays import cast
from engine.weights.component import Component, digest_of
from engine.weights.files import new_file
from engine.weights.safetensors_io import DTYPES, read_header, read_metadata, write
from engine.world import batch, retold

STEPS = 16  # whose latents are one file
FLOAT16 = np.dtype(np.float16)
NAME = "mean"  # of the posterior, which is what a U-Net learns


def kept_latents(
    config: TrainConfig,
    seed: int,
    tokenizer: Tokenizer,
    vae: Component,
    folder: pathlib.Path,
    process: int = 0,
    processes: int = 1,
) -> BatchAt:
    """step -> {"mean": float16 (B / processes, h, w, C), "ids": int32 (B / processes, L)}

    The pictures of the first `diffusion.distinct` numbers, again and again. Each time a caption tells its
    scene anew; the first time as `captioned_pictures` would.

    Args:
      seed: of the scenes.
      vae: encodes them.
      folder: for the files; those in it that were made of something else are written anew.
      process, processes: see `own_rows`.
    """
    stage, size = config.diffusion, config.image_size
    first, share = own_rows(stage.batch_size, process, processes)
    steps = stage.distinct // stage.batch_size  # of one round
    encode = encoder(vae, share)
    about = {
        "vae": digest_of(vae.params),
        "pictures": [seed, size, stage.batch_size, stage.easy, stage.easy_steps, process, processes],
    }

    def easy(step: int) -> float:
        return easy_share(step, stage.easy, stage.easy_steps)

    def encoded(step: int) -> np.ndarray:
        return encode(batch(seed, step * stage.batch_size + first, share, size, easy(step))[0])

    @functools.lru_cache(maxsize=4)  # files, in memory only where they are read
    def latents(block: int) -> np.ndarray:
        last = min((block + 1) * STEPS, steps)
        return kept(
            folder / f"{process:03}-{block:06}.safetensors",
            {name: json.dumps(value) for name, value in about.items()},
            lambda: np.concatenate([encoded(step) for step in range(block * STEPS, last)]),
        )

    def batch_at(step: int) -> dict[str, np.ndarray]:
        again, place = divmod(step, steps)
        row = place % STEPS * share
        captions = retold(seed, place * stage.batch_size + first, share, easy(place), again)
        return {NAME: latents(place // STEPS)[row : row + share], "ids": tokenizer.encode(captions)}

    return batch_at


def encoder(vae: Component, rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 (rows, H, W, 3) -> the means of their latents (rows, h, w, C), float16, on all local devices."""
    devices, build = Devices(), applier(vae.graphdef)
    params = devices.share(vae.params)

    @devices.map
    def means(params, batch):
        return build(params).encode(to_float(batch)).mean

    padded = np.minimum(np.arange(rows + -rows % devices.count), rows - 1)

    def encode(images: np.ndarray) -> np.ndarray:
        found = devices.fetch(means(params, devices.shard_batch(images[padded])))
        return cast(np.asarray(found, np.float32), FLOAT16, NAME)[:rows]

    return encode


def kept(path: pathlib.Path, about: Mapping[str, str], make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of a file, which stays on the disk; made first, where the file is not there or of another."""
    if not path.exists() or about.items() - read_metadata(path).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        array = make()
        with new_file(path) as new:
            write(new, {NAME: array.shape}, {NAME: array.dtype}, {NAME: array}.__getitem__, about)
    tensor = read_header(path)[NAME]
    return np.memmap(path, DTYPES[tensor.code], "r", tensor.start, tensor.shape)
