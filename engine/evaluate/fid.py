"""The features that FID compares (Heusel et al. 2017), of drawn pictures and of a folder of real ones.

    network = Features("inception.safetensors")
    fid = frechet_distance(network.moments(batches), network.folder_moments("photographs"))

Two programs: one brings pictures to the network's size and is compiled for each size of picture; the other,
which takes much longer to compile, is the network, and is compiled once. A folder may hold hundreds of sizes:
its pictures come to the network's size on the host.

Figures can be compared with torch-fidelity's, whose resize of TensorFlow 1 this is. pytorch-fid's network is
the same, behind another resize: its statistics are for pictures that it has read too.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from engine.evaluate.frechet import Moments, moments_of
from engine.models.inception import resize
from engine.parallel import Devices, pad
from engine.types import UserError
from engine.weights.inception import load_inception

BATCH_SIZE = 16  # pictures on a device at once, with some 130 MB of activations
FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Placed = tuple[jax.Array, int]  # pictures from `resize` on the devices, and how many of them are no padding


class Features:
    """FID's network on all devices. Its programs are compiled when they are first needed, and kept."""

    def __init__(
        self, weights: str | os.PathLike, devices: Devices | None = None, batch_size: int = BATCH_SIZE
    ):
        """Reads the network.

        Args:
          weights: a .safetensors file with the keys of torch-fidelity, see `load_inception`.
          devices: None: all of this process.
          batch_size: pictures on a device at once.

        Raises:
          UserError: the file is not there, broken, or another network.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: write 1 or more")
        self.devices = devices or Devices()
        self.size = batch_size * self.devices.count
        self._graphdef, self._params = load_inception(weights, self.devices.place)
        self._resize = self.devices.map(lambda _, images: resize(images))
        self._network = self.devices.map(self._apply)

    # ---- what people call

    def moments(self, batches: Iterable[UInt8[np.ndarray, "_ _ _ 3"]]) -> Moments:
        """Of drawn pictures, batch by batch as they come; the next is asked for while the devices work.

        Raises:
          UserError: there are no pictures.
        """
        return moments_of(self.features(batches))

    def folder_moments(self, folder: str | os.PathLike, check: Callable[[], Any] = lambda: None) -> Moments:
        """Of the PNG, JPEG and WebP files in a folder and those below it; hidden ones are left out.

        Pictures are read as torch-fidelity and pytorch-fid read them, for comparable figures: without
        their transparency, and not turned as their EXIF says.

        Args:
          check: called after each batch; what it raises stops the work.

        Raises:
          UserError: no folder, no pictures in it, or one that cannot be read.
        """
        files = _pictures(Path(os.path.expanduser(folder)))
        with tqdm(total=len(files), desc=str(folder), unit="picture", leave=False) as bar:

            def progress(count: int) -> None:
                bar.update(count)
                check()

            return moments_of(self._run(self._read(files, progress)))

    def features(
        self, batches: Iterable[UInt8[np.ndarray, "_ _ _ 3"]]
    ) -> Iterator[Float[np.ndarray, "_ 2048"]]:
        """The features of each picture, in order, in batches of the devices' size."""
        return self._run(self._resized(batches))

    def features_of(self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "N 2048"]:
        """The features of pictures at hand, one or more. Of one size, they come to the network's on the
        devices; of several, on the host, so that no program is compiled for each of them.
        """
        alike = len({picture.shape for picture in pictures}) == 1
        placed = self._resized([np.stack(pictures)]) if alike else self._resized_here(pictures)
        return np.concatenate(list(self._run(placed)))

    # ---- on the devices; (shared, batched) -> batched

    def _apply(self, params: Any, images: Any) -> Any:
        return nnx.merge(self._graphdef, nnx.State(params))(images)

    # ---- the way through them

    def _resized(self, batches: Iterable[np.ndarray]) -> Iterator[Placed]:
        for batch in _rebatched(batches, self.size):
            placed = self.devices.shard_batch(pad(batch, self.size))
            yield self._resize({}, placed), len(batch)

    def _resized_here(self, pictures: Sequence[np.ndarray]) -> Iterator[Placed]:
        for first in range(0, len(pictures), self.size):
            batch = np.stack([resize(picture[None])[0] for picture in pictures[first : first + self.size]])
            yield self.devices.shard_batch(pad(batch, self.size)), len(batch)

    def _read(self, files: Sequence[Path], progress: Callable[[int], Any]) -> Iterator[Placed]:
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(files), self.size):
                part = files[first : first + self.size]
                batch = np.stack(list(pool.map(_read_resized, part)))
                yield self.devices.shard_batch(pad(batch, self.size)), len(part)
                progress(len(part))

    def _run(self, batches: Iterable[Placed]) -> Iterator[np.ndarray]:
        """The network on each batch. The next one is made ready before this one is waited for."""
        before = None
        for images, count in batches:
            found = self._network(self._params, images), count
            if before is not None:
                yield self._fetched(*before)
            before = found
        if before is not None:
            yield self._fetched(*before)

    def _fetched(self, features: jax.Array, count: int) -> np.ndarray:
        return self.devices.fetch(features)[:count]


def _rebatched(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same pictures, `size` at a time; fewer at the end, and before pictures of another size."""
    pictures = (picture for batch in batches for picture in batch)
    for _, alike in itertools.groupby(pictures, key=np.shape):
        while part := list(itertools.islice(alike, size)):
            yield np.stack(part)


def _pictures(folder: Path) -> list[Path]:
    """All pictures in a folder and those below it, in the order of the names; UserError without any."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: write the path of a folder of pictures")
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    found = sorted(file for file in found if file.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder} holds no pictures: {', '.join(SUFFIXES)} are read")
    return found


def _read_resized(file: Path) -> Float[np.ndarray, "299 299 3"]:
    try:
        with Image.open(file, formats=FORMATS) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises half a dozen types for broken files
        raise UserError(f"{file} cannot be read ({error}): mend it, or take it out of the folder") from None
    return resize(pixels[None])[0]
