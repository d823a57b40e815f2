"""The pictures of several sources under one number each; and a first look at all of them."""

import bisect
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.finish import BESIDE, SETTINGS_KEY
from engine.pixels import Crop, Header, read_header, read_pixels
from engine.text.reading import Reading, said
from engine.train.sources.item import Accept, Item, Source, Unusable, caption_in, required, row_in_json

AT_ONCE = 256  # pictures that a thread looks at before it takes others


TAIL = 1024  # bytes at the end of a file, which are others where its pixels are: in a PNG a sum of all


class Look(NamedTuple):
    """What the header of a picture and its caption tell."""

    width: int
    height: int
    digest: bytes  # of both, of the file's size and its end, and of the caption


class Pictures:
    """Pictures by number. Threads may read at once."""

    def __init__(self, sources: Sequence[Source], accept: Accept = required, controlled: bool = False):
        """controlled: with each comes what a ControlNet is to be shown of it, and must."""
        self._sources, self._accept, self._controlled = sources, accept, controlled
        self.ends = list(itertools.accumulate(map(len, sources)))  # of each source's numbers

    def __len__(self) -> int:
        return self.ends[-1]

    def name(self, number: int) -> str:
        source, i = self._find(number)
        return source.name(i)

    def look(self, number: int) -> Look:
        """Raises Unusable for what cannot be read, and where the caption is not accepted."""
        item = self._open(number)
        with item.file as file:
            header = read_header(file, SETTINGS_KEY)
            caption = item.caption if item.caption is not None else _caption_inside(header.settings)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            end = zlib.crc32(file.read(TAIL))
        told = f"{header.width} {header.height} {size} {end} {self._accept(caption)}"
        if self._controlled:
            told += " {} {}".format(*_size_of_control(item, header))
        return Look(header.width, header.height, hashlib.sha256(told.encode()).digest()[:8])

    def caption(self, number: int) -> str:
        """Of the picture nothing is read, unless the caption stands inside. Raises Unusable."""
        item = self._open(number)
        with item.file as file:
            if item.caption is not None:
                return required(item.caption)
            return required(_caption_inside(read_header(file, SETTINGS_KEY).settings))

    def read(
        self, number: int, width: int, height: int, crop: Crop
    ) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Pixels, as `read_pixels` gives them, caption, pixels of the control picture. Raises Unusable."""
        item = self._open(number)
        with item.file as file:
            caption = item.caption
            if caption is None:
                caption = _caption_inside(read_header(file, SETTINGS_KEY).settings)
                file.seek(0)
            image, caption = read_pixels(file, width, height, crop), self._accept(caption)
        if not self._controlled:
            return image, caption, None
        with _control_of(item) as file:
            # As where it is drawn with: what is transparent has its colours all the same.
            return image, caption, read_pixels(file, width, height, crop, alpha=False)

    def look_at_all(
        self, pool: concurrent.futures.Executor, judge: Callable[[Look], None]
    ) -> Iterator[Look | Unusable]:
        """A look at each picture, in order.

        Args:
          judge: raises Unusable for what a run has no use for.
        """

        def look_at(first: int) -> list[Look | Unusable]:
            return [judged(number) for number in range(first, min(first + AT_ONCE, len(self)))]

        def judged(number: int) -> Look | Unusable:
            try:
                judge(look := self.look(number))
                return look
            except Unusable as problem:
                return problem

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # they are skipped
            for looks in pool.map(look_at, range(0, len(self), AT_ONCE)):
                yield from looks

    def _find(self, number: int) -> tuple[Source, int]:
        place = bisect.bisect_right(self.ends, number)
        return self._sources[place], number - (self.ends[place - 1] if place else 0)

    def _open(self, number: int) -> Item:
        source, i = self._find(number)
        return source.read(i)


@contextlib.contextmanager
def _control_of(item: Item) -> Iterator[io.BufferedIOBase]:
    """The file of its control picture. Unusable, within too, says of which picture it is."""
    if item.control is None:
        raise Unusable(
            "no control picture: a row names it as conditioning_image, or 1.control.png is 1.png's"
        )
    try:
        with item.control() as file:
            yield file
    except Unusable as problem:
        raise Unusable(f"its control picture: {problem}") from None


def _size_of_control(item: Item, picture: Header) -> tuple[int, int]:
    """Of the control picture. Unusable unless it lies over the picture, but for a pixel of rounding."""
    with _control_of(item) as file:
        width, height, _ = read_header(file, SETTINGS_KEY)
    longest = max(width, height, picture.width, picture.height)
    if abs(width * picture.height - height * picture.width) > longest:
        raise Unusable(
            f"{picture.width} x {picture.height} pixels, and its control picture {width} x {height}: they "
            "need the same proportions"
        )
    return width, height


def _caption_inside(settings: str | None) -> str | None:
    if settings is None:
        return None
    row = row_in_json(settings.encode("utf-8", "surrogatepass"))
    if isinstance(row, dict) and not BESIDE.isdisjoint(row):
        raise Unusable("a strip or a sheet that launch.generate made of pictures")
    caption = caption_in(row, "prompt")
    return said(caption, Reading(*(bool(row.get(name)) for name in ("prompt_weights", "long_prompts"))))
