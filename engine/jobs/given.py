"""The pictures that a run is to change, read from their files: --image and --mask, and the columns of rows.

A job looks at the files of all its rows before it begins: that they are there, what size they have, and what
tells them from others, which is a few kilobytes of each. Their pixels are read when they are to be drawn.
"""

import errno
import functools
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from engine import edits
from engine.config import GenerateConfig, JobConfig
from engine.finish import SETTINGS_KEY
from engine.pipeline import Pipeline
from engine.pixels import Crop, Unusable, read_header, read_pixels
from engine.requests import Given
from engine.text.row_files import PATHS, SHOWN
from engine.text.row_paths import astray
from engine.text.rows import Row
from engine.types import Trouble, UserError

LATENTS = 8  # sides are multiples of so many, as most U-Nets halve them three times
LARGEST = 2**28  # bytes of a file
ENDS = 2**12  # bytes at either end of a file that, with its size, tell it from others
LOOKS = 4096  # files that are remembered, for rows that share a picture
HOPELESS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)
HOPELESS += (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # all other errors may pass
T = TypeVar("T")


class Paths(NamedTuple):
    """The files of a picture to change; '' where there is none."""

    image: str = ""
    mask: str = ""


class Look(NamedTuple):
    """What a file tells without its pixels."""

    width: int  # as seen
    height: int
    mark: str  # other contents have another


class Seen(NamedTuple):
    """The picture of a row, by the looks of its files."""

    height: int  # to draw at
    width: int
    masked: bool
    mark: str


def of_flags(config: GenerateConfig) -> Paths:
    return Paths(config.image, config.mask)


def check_flags(config: GenerateConfig) -> None:
    """UserError where a file of --image or --mask cannot be read, or the two do not fit."""
    if config.image:
        looked(of_flags(config))
    elif config.mask:  # of the pictures that rows name
        _of(config.mask, _look)


def stand_in(height: int, width: int, masked: bool | None) -> Given:
    """For pictures that are not read yet: of their shape, without their pixels.

    masked: whether the picture to change has a mask; None: there is no picture.
    """
    if masked is None:
        return Given()
    image = np.broadcast_to(np.uint8(0), (height, width, 3))
    return Given(image, np.broadcast_to(np.float32(0), (height, width)) if masked else None)


def looked(paths: Paths) -> tuple[Look, Look | None]:
    """At the picture and its mask.

    Raises:
      UserError: a file cannot be read, or the mask is of another size than the picture.
    """
    image = _of(paths.image, _look)
    mask = _of(paths.mask, _look) if paths.mask else None
    _check_sizes(paths, image, mask)
    return image, mask


def size(look: Look, pipe: Pipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width to draw at: those that are given; else about as many pixels as the model has learned
    to draw, in the shape of the picture, which is cropped by what is left over.
    """
    default_height, default_width = pipe.default_size
    scale = (default_height * default_width / (look.height * look.width)) ** 0.5
    if height:
        scale = height / look.height
    elif width:
        scale = width / look.width
    step = LATENTS * pipe.model.vae.config.scale

    def rounded(side: float) -> int:
        return max(step, round(side * scale / step) * step)

    return height or rounded(look.height), width or rounded(look.width)


def read(paths: Paths, height: int, width: int) -> Given:
    """The picture and its mask, where there are any, scaled to fill height x width and cropped alike.

    Raises:
      UserError: a file cannot be read.
    """
    try:
        return _read(paths, height, width)
    except OSError as error:
        raise UserError(f"{error.filename or paths.image}: {error.strerror or error}") from None


def _read(paths: Paths, height: int, width: int) -> Given:
    """The same; what may pass, as a network that fails, is an OSError."""

    def pixels(file: BinaryIO) -> np.ndarray:
        return read_pixels(io.BytesIO(file.read()), width, height, Crop())  # trouble is no damage

    if not paths.image:
        return Given()
    image = _of(paths.image, pixels, passing=True)
    if not paths.mask:
        return Given(image)
    return Given(image, _of(paths.mask, pixels, passing=True).astype(np.float32).mean(-1) / 255)


def _look(file: BinaryIO) -> Look:
    header = read_header(file, SETTINGS_KEY)  # type: ignore[arg-type]
    length = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256(f"{length} ".encode())
    for start in (0, max(length - ENDS, 0)):
        file.seek(start)
        digest.update(file.read(ENDS))
    return Look(header.width, header.height, digest.hexdigest()[:16])


def _check_sizes(paths: Paths, image: Look, mask: Look | None) -> None:
    if mask is not None and mask[:2] != image[:2]:
        raise UserError(
            f"{paths.mask} has {mask.width} x {mask.height} pixels, and the picture {paths.image} "
            f"{image.width} x {image.height}: a mask is as large as its picture, white where it is drawn anew"
        )


def _of(path: str, how: Callable[[BinaryIO], T], passing: bool = False) -> T:
    """What `how` finds in the file.

    Args:
      passing: whether what is not hopeless stays an OSError.

    Raises:
      UserError: it is not there, is no picture, or a broken one.
    """
    try:
        with _opened(os.path.expanduser(path)) as file:
            return how(file)
    except OSError as error:
        if passing and error.errno not in HOPELESS:
            raise
        raise UserError(f"{path}: {error.strerror or error}; write the file of a picture") from None
    except ValueError:  # half a surrogate pair, or a NUL
        raise UserError(f"{path[:SHOWN]!r} is no path; write that of a picture") from None
    except Unusable as problem:
        raise UserError(f"{path}: {problem}; write a PNG, JPEG or WebP") from None


def _opened(path: str) -> BinaryIO:
    """A file to read from, and no pipe that would never end."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST:
        return file
    file.close()
    if status.st_size > LARGEST:
        raise Unusable(f"a file of {status.st_size >> 20} MiB; the most is {LARGEST >> 20}")
    raise Unusable("no file")


# ---- of rows


class OfRows:
    """The pictures of a job: those that rows name, and where they name none the job's own.

    Paths in rows go from the folder of their file on (for standard input, from the current one) and do not
    lead out of it. Threads may ask at once.
    """

    def __init__(self, config: JobConfig, pipe: Pipeline):
        self._config, self._pipe = config, pipe
        of_stdin = config.prompts_file == "-"
        self._folder = "" if of_stdin else os.path.dirname(os.path.expanduser(config.prompts_file))
        self._base = os.path.realpath(self._folder)
        self._look = functools.lru_cache(LOOKS)(self._look_at)
        self._usual = {m: edits.default_strength(stand_in(1, 1, m), pipe.made_for) for m in (True, False)}

    def paths(self, row: Row) -> Paths:
        """As they can be opened, and as pictures remember them."""
        image = self._path(row.image, self._config.image)
        return Paths(image, self._path(row.mask, self._config.mask)) if image else Paths()

    def _path(self, own: str | None, of_job: str) -> str:
        if own is None:
            return of_job
        # No home, whatever the name begins with
        return os.path.join(self._folder or ("." if own.startswith("~") else ""), own) if own else ""

    def look_ahead(self, rows: Iterable[Row], threads: Executor) -> None:
        """Looks at the files of these rows, many at once, so that `seen` need not wait for the disk.

        Raises:
          UserError: trouble that may pass, as a network that fails.
        """
        paths = {path: None for row in rows for path in self.paths(row) if path}
        for _ in threads.map(self._look, paths):
            pass

    def seen(self, row: Row) -> Seen | str | None:
        """The picture of a row, or why it cannot be drawn; None where it has none.

        Raises:
          UserError: trouble that may pass.
        """
        paths = self.paths(row)
        if not paths.image:
            alone = {name: getattr(row, name) for name in ("mask", "strength")}
            named = [
                f"{name}={str(value)[:SHOWN]}" for name, value in alone.items() if value not in (None, "")
            ]
            return f"{named[0]} without a picture: write its image, too" if named else None
        if why := self._astray(row):
            return why
        image = self._look(paths.image)
        mask = self._look(paths.mask) if paths.mask else None
        if isinstance(image, str) or isinstance(mask, str):
            return image if isinstance(image, str) else str(mask)
        try:
            _check_sizes(paths, image, mask)
        except UserError as error:
            return str(error)
        asked = row.height or self._config.height, row.width or self._config.width
        mark = image.mark + (mask.mark if mask else "")
        return Seen(*size(image, self._pipe, *asked), mask is not None, mark)

    def read(self, row: Row, height: int, width: int) -> Given:
        """The pixels of a row that has a picture.

        Raises:
          UserError: it cannot be drawn.
          OSError: trouble that may pass.
        """
        if why := self._astray(row):
            raise UserError(why)
        return _read(self.paths(row), height, width)

    def strength(self, row: Row, masked: bool) -> float:
        """How much of the row's picture is forgotten."""
        of_job = self._usual[masked] if self._config.strength is None else self._config.strength
        return of_job if row.strength is None else row.strength

    @staticmethod
    def _look_at(path: str) -> Look | str:
        try:
            return _of(path, _look, passing=True)
        except UserError as error:
            return str(error)
        except OSError as error:
            reason = error.strerror or error
            again = "once that is mended, the same command goes on"
            raise Trouble(f"{path}: cannot be read: {reason}; {again}") from None

    def _astray(self, row: Row) -> str:
        for name in PATHS:
            path = getattr(row, name)
            if path and (why := astray(path, self._base)):
                return f"{name}={path[:SHOWN]!r} {why}"
        return ""
