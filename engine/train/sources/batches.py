"""Batches of pictures with captions, addressed by step.

When a run begins, the header and the caption of every picture are read, and what cannot be used is left out.
Damage behind the header shows only when a picture is decoded: then the one that would stand at the same place
of a later batch stands in, so that which pictures a step sees still follows from the step and the data alone.
"""

import concurrent.futures
import copy
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from engine.config import DataConfig
from engine.pixels import Crop, sizes
from engine.text.tokenizer import Tokenizer, Tokenizers
from engine.train.buckets import Order, nearest_shape, shapes
from engine.train.data import Batch, BatchAt, own_rows, shuffled
from engine.train.sources.finding import open_source
from engine.train.sources.item import Accept, Unusable, required
from engine.train.sources.pictures import Look, Pictures
from engine.train.sources.skipped import Skipped
from engine.types import UserError

T = TypeVar("T")
CROP, SAMPLE = 2, 3  # what is drawn, in seeds; see engine.train.buckets
Reword = Callable[[Sequence[str], int, int], list[str]]  # (captions, step, place of the first in the batch)

NONE_DECODED = "data: no picture can be decoded; skipped.jsonl says why"


class Row(NamedTuple):
    """A picture with its caption; of several, see `Rows`."""

    image: np.ndarray  # uint8 (H, W, 3)
    caption: str
    sizes: np.ndarray  # int32 (6,), see `engine.pixels.sizes`
    control: np.ndarray | None = None  # uint8 (H, W, 3), what a ControlNet is to be shown


class Rows(NamedTuple):
    images: np.ndarray  # uint8 (N, H, W, 3)
    captions: list[str]
    sizes: np.ndarray  # int32 (N, 6)
    controls: np.ndarray | None = None  # uint8 (N, H, W, 3)


RowsAt = Callable[[int, int, int], Rows]  # (step, first row, number of rows) -> those of a step's batch


def training_batches(
    config: DataConfig,
    batch_size: int,
    tokenizer: Tokenizer | Tokenizers | None,
    *,
    size: int,
    workdir: pathlib.Path,
    process: int = 0,
    processes: int = 1,
    keep_tags: int | None = None,
    accept: Accept = required,
    reword: Reword | None = None,
    sized: bool = False,
    controlled: bool = False,
) -> BatchAt:
    """The pictures of a config.

    Args:
      batch_size: of all hosts together.
      tokenizer: None leaves out the captions' ids.
      size: of the pictures, where the config does not say.
      workdir: for skipped.jsonl, the list of what was left out, and data.json, which tells other data.
      process, processes: each host makes its part of the batch, rows process * n to (process + 1) * n.
      keep_tags: None, or captions are `engine.train.data.shuffled`.
      accept: says which captions can be used; pictures with others are skipped.
      reword: what stands in for the captions.
      sized: with "sizes", what SDXL is told beside the words.
      controlled: with "control", what a ControlNet is to be shown.

    Returns:
      step -> {"image": uint8 (B / processes, H, W, 3), "ids": int32 (B / processes, L), of two tokenizers
      (B / processes, 2, L), "sizes": int32 (B / processes, 6), see `engine.pixels.sizes`,
      "control": as "image"}.

    Raises:
      UserError: the config is wrong, or nothing that it names can be used.
    """
    config.validate()
    pictures = open_pictures(config, batch_size, config.size or size, workdir, process, accept, controlled)
    rows = pictures.rows
    return batches_of(rows, config.seed, batch_size, tokenizer, process, processes, keep_tags, reword, sized)


def batches_of(
    rows: RowsAt,
    seed: int,
    batch_size: int,
    tokenizer: Tokenizer | Tokenizers | None,
    process: int = 0,
    processes: int = 1,
    keep_tags: int | None = None,
    reword: Reword | None = None,
    sized: bool = False,
) -> BatchAt:
    """What a host trains on, of rows; see `training_batches`. seed: of the tags' order."""
    first, share = own_rows(batch_size, process, processes)

    def batch_at(step: int) -> Batch:
        images, captions, beside, controls = rows(step, first, share)
        if tokenizer is None:
            return {"image": images}
        if reword is not None:
            captions = reword(captions, step, first)
        if keep_tags is not None:
            captions = shuffled(captions, seed, step, keep_tags, first)
        batch = {"image": images, "ids": tokenizer.encode(captions)}
        batch |= {"sizes": beside} if sized else {}
        return batch if controls is None else {**batch, "control": controls}

    return batch_at


def open_pictures(
    config: DataConfig,
    batch_size: int,
    size: int,
    workdir: pathlib.Path,
    process: int = 0,
    accept: Accept = required,
    controlled: bool = False,
) -> "PictureBatches":
    """Looks at all pictures of a config, and keeps in `workdir` what was found; see `training_batches`."""
    workdir.mkdir(parents=True, exist_ok=True)
    skipped = Skipped(workdir / ("skipped.jsonl" if process == 0 else f"skipped-{process}.jsonl"))
    pictures = PictureBatches(config, batch_size, size, skipped, accept, controlled)
    if process == 0:
        print(pictures.summary(), flush=True)
        _same_data(workdir / "data.json", pictures.fingerprint)
    return pictures


def _same_data(file: pathlib.Path, fingerprint: str) -> None:
    """Says so where a run goes on with other data than it began with."""
    if file.exists() and json.loads(file.read_text())["fingerprint"] != fingerprint:
        print("data: changed since this run began; the batches from here on are others", flush=True)
    file.write_text(json.dumps({"fingerprint": fingerprint}))


class PictureBatches:
    """All pictures of a config, in batches.

    Attributes: shapes, those that have pictures, by bucket; usable and skipped, how many pictures; order;
    fingerprint, which is that of the same pictures, wherever they lie.
    """

    def __init__(
        self,
        config: DataConfig,
        batch_size: int,
        size: int,
        skipped: Skipped,
        accept: Accept = required,
        controlled: bool = False,
    ):
        self._config, self._batch_size, self._skipped = config, batch_size, skipped
        self._pool = concurrent.futures.ThreadPoolExecutor(config.workers, "decode")
        self._pictures = Pictures(
            [open_source(path, config.kind, config.caption_field, controlled) for path in config.paths],
            accept,
            controlled,
        )
        among = shapes(size, config.buckets, config.multiple, config.max_aspect)
        self._seen = np.zeros((len(self._pictures), 2), np.int32)  # width and height of each, as it is
        shape_of, digests, problem = self._look_at_all(among)
        if not len(digests):
            raise UserError(
                f"{', '.join(config.paths)[:200]}: no picture can be used; skipped.jsonl says why "
                f"(of the last: {problem})"
            )
        self.usable, self.skipped = len(digests), len(self._pictures) - len(digests)
        self._numbers = self._repeated(np.flatnonzero(shape_of >= 0))
        used, self._buckets = np.unique(shape_of[self._numbers], return_inverse=True)
        self.shapes, self._counts = [among[i] for i in used], np.bincount(self._buckets)
        self.order = Order(self._buckets, batch_size, config.seed)
        self.fingerprint = _digest(digests, config)
        self._bad: set[int] = set()  # numbers that were found damaged: known, they need no second try

    def cut(self, batch_size: int) -> "PictureBatches":
        """The same pictures in batches of another size, without another look at them."""
        other = copy.copy(self)
        other._batch_size = batch_size
        other.order = Order(self._buckets, batch_size, self._config.seed)
        return other

    def rows(self, step: int, first: int, count: int) -> Rows:
        """Rows first .. first + count - 1 of a step's batch."""
        bucket, start = self.order.batch(step)
        places = range(start + first, start + first + count)
        return _together(self._pool.map(functools.partial(self._row, bucket), places))

    def numbers(self, bucket: int) -> np.ndarray:
        """Of the pictures of a bucket, each once."""
        return np.unique(self._numbers[self.order.pictures(bucket)])

    def whole(self, bucket: int, numbers: np.ndarray) -> Rows:
        """These pictures of a bucket, cropped at the centre; the damaged are left out, and listed."""
        return self._central(numbers, *self.shapes[bucket])

    def sample_images(self, count: int, size: int) -> np.ndarray:
        """Central squares of at most `count` pictures, drawn by the seed: uint8 (N, size, size, 3).

        Raises:
          UserError: none of them can be decoded.
        """
        found = self._central(self._sample(count), size, size)
        if not found.captions:
            raise UserError(NONE_DECODED)
        return found.images

    def sample_captions(self, count: int) -> list[str]:
        """Of at most `count` pictures, drawn by the seed, each once; no picture is decoded."""
        return self._each(self._pictures.caption, self._sample(count))

    def _sample(self, count: int) -> np.ndarray:
        rng = np.random.default_rng([self._config.seed, SAMPLE])
        return rng.permutation(np.unique(self._numbers))[:count]

    def _central(self, numbers: np.ndarray, width: int, height: int) -> Rows:
        found = self._each(lambda number: self._read(number, width, height, Crop()), numbers)
        return (
            _together(found)
            if found
            else Rows(np.empty((0, 1, 1, 3), np.uint8), [], np.empty((0, 6), np.int32))
        )

    def _read(self, number: int, width: int, height: int, crop: Crop) -> Row:
        image, caption, control = self._pictures.read(number, width, height, crop)
        beside = sizes(*self._seen[number].tolist(), width, height, crop)
        return Row(image, caption, beside, control)

    def _each(self, read: Callable[[int], T], numbers: np.ndarray) -> list[T]:
        """What `read` gives for each number; what it finds unusable is left out, and listed."""

        def tried(number: int) -> T | None:
            try:
                return read(number)
            except Unusable as problem:
                self._note(number, problem)
                return None

        return [each for each in self._pool.map(tried, numbers.tolist()) if each is not None]

    def summary(self) -> str:
        each = ", ".join(f"{s.width}x{s.height}: {n}" for s, n in zip(self.shapes, self._counts, strict=True))
        skipped = f"; {self.skipped} skipped, see skipped.jsonl" if self.skipped else ""
        return f"data: {self.usable} pictures ({each}){skipped}"

    def _look_at_all(self, among: list) -> tuple[np.ndarray, list[bytes], str]:
        """The shape of each picture, -1 for what cannot be used; digests of the others; the last problem."""
        shape_of, digests, problem = np.full(len(self._pictures), -1, np.int32), [], ""
        for number, look in enumerate(self._pictures.look_at_all(self._pool, self._judge)):
            if isinstance(look, Unusable):
                self._skipped.add(self._pictures.name(number), problem := str(look))
            else:
                self._seen[number] = look.width, look.height
                shape_of[number] = nearest_shape(look.width, look.height, among)
                digests.append(look.digest)
        return shape_of, digests, problem

    def _judge(self, look: Look) -> None:
        if min(look.width, look.height) < self._config.min_size:
            raise Unusable(f"{look.width} x {look.height} pixels: less than min_size={self._config.min_size}")

    def _repeated(self, numbers: np.ndarray) -> np.ndarray:
        """Each number as often as an epoch shows it."""
        source = np.searchsorted(self._pictures.ends, numbers, "right")
        repeats = np.broadcast_to(self._config.repeats, len(self._config.paths))
        return np.repeat(numbers, repeats[source])

    def _row(self, bucket: int, place: int) -> Row:
        for slot, round in self._candidates(bucket, place):
            number = int(self._numbers[slot])
            if number in self._bad:
                continue
            try:
                return self._read(number, *self.shapes[bucket], self._crop(slot, round))
            except Unusable as problem:
                self._note(number, problem)
        raise UserError(NONE_DECODED)

    def _note(self, number: int, problem: Unusable) -> None:
        self._bad.add(number)
        self._skipped.add(self._pictures.name(number), str(problem))

    def _candidates(self, bucket: int, place: int) -> Iterator[tuple[int, int]]:
        """The picture at the place; then those that stand in for it: of its bucket, then any.

        B places on lies the same row of another batch, so that what another host reads stays its own.
        """
        for later in range(self.order.count(bucket)):
            yield self.order.picture(bucket, place + later * self._batch_size)
        yield from ((slot, 0) for slot in range(len(self._numbers)))

    def _crop(self, slot: int, round: int) -> Crop:
        """Drawn for the picture and the round, whatever batch it comes into."""
        rng = np.random.default_rng([self._config.seed, CROP, slot, round])
        across, down, flip = rng.random(3).tolist()
        if self._config.crop == "center":
            across = down = 0.5
        return Crop(across, down, flip < self._config.flip)


def _together(rows: Iterable[Row]) -> Rows:
    images, captions, beside, controls = zip(*rows, strict=True)
    shown = None if controls[0] is None else np.stack(controls)
    return Rows(np.stack(images), list(captions), np.stack(beside), shown)


def _digest(digests: list[bytes], config: DataConfig) -> str:
    """Of all pictures, and of what of the config decides on their order and shape."""
    names = ("repeats", "size", "buckets", "max_aspect", "multiple", "crop", "flip", "seed")
    settings = json.dumps({name: getattr(config, name) for name in names})
    return hashlib.sha256(b"".join(digests) + settings.encode()).hexdigest()
