"""How fast a folder's weights come onto the devices, beside what its bytes take at least."""

import os
import pathlib
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.benchmark import timing
from engine.benchmark.report import Row
from engine.loading import SHIPPED
from engine.parallel import Devices
from engine.weights.component import READERS, find_weights, read_headers
from engine.weights.folder import load_folder
from engine.weights.index import read_index
from engine.weights.kinds import KNOWN

PIECE = 2**24  # bytes


def row(folder: pathlib.Path | None, dtype: str, parallel: str, rounds: int) -> Row:
    """Loading, reading the same files, copying as many bytes in memory, and filling the memory, in turn.

    The files are in the memory of the operating system if it has room: then it is memory that is measured.
    To fill is to write numbers once where a model's would lie, by as many threads as read them: most of that
    is the system's, which makes room. All rates are of the files' bytes.
    """
    folder, devices = folder or SHIPPED, Devices(parallel)
    stems = {kind: KNOWN[kind].stem for kind in read_index(folder).kinds}
    weights = [find_weights(folder / kind, stem, None) for kind, stem in stems.items()]
    files = [file for each in weights for file in read_headers(each)]
    size = sum(file.stat().st_size for file in files)

    sizes: list[int] = []  # of the parameters, as they lie in memory

    def load() -> None:
        model = load_folder(folder, jnp.dtype(dtype), place=devices.place)
        params = jax.block_until_ready([part.params for part in model.parts.values()])
        sizes[:] = [array.nbytes for array in jax.tree.leaves(params)]

    source, target = np.ones(PIECE, np.uint8), np.ones(PIECE, np.uint8)

    def read() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(target):
                    pass

    used = np.ones(size, np.uint8)

    def copy() -> None:
        for first in range(0, size, PIECE):
            part = used[first : first + PIECE]
            np.copyto(part, source[: len(part)])

    def fill() -> None:
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            _ = list(pool.map(lambda size: np.full(size, 1, np.uint8), sizes))  # all at once, as a model's

    calls: dict[str, Callable[[], Any]] = {"load": load, "read": read, "copy": copy, "fill": fill}
    for call in calls.values():
        call()
    seconds = timing.in_turn(calls, rounds)
    rate = {name: size / statistics.median(each) / 1e9 for name, each in seconds.items()}
    return {
        "GB": size / 1e9,
        "dtype": dtype,
        "GB/s": rate["load"],
        "read GB/s": rate["read"],
        "copy GB/s": rate["copy"],
        "fill GB/s": rate["fill"],
        "of reading": str(timing.ratio(seconds["read"], seconds["load"])),
        "of copying": str(timing.ratio(seconds["copy"], seconds["load"])),
        "of filling": str(timing.ratio(seconds["fill"], seconds["load"])),
        "_seconds": seconds,
    }
