"""Pictures beside the words, read from their files: --image, --mask, --control_image, --image_prompt, and
columns of rows.

A job looks at the files of all its rows before it begins: that they are there, what size they have, and what
tells them from others, which is a few kilobytes of each. Their pixels are read when they are to be drawn.
"""

import errno
import functools
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from engine import adapters, controls, edits, sights
from engine.config import PICTURED, GenerateConfig, JobConfig
from engine.finish import SETTINGS_KEY
from engine.pipeline import Pipeline
from engine.pixels import Crop, Unusable, read_header, read_pixels
from engine.requests import Given
from engine.text.row_files import PATHS, SHOWN
from engine.text.row_paths import astray
from engine.text.rows import Row
from engine.types import Trouble, UserError
from engine.weights.clip_pixels import PixelsConfig, fitted

LATENTS = 8  # sides are multiples of so many, as most U-Nets halve them three times
LARGEST = 2**28  # bytes of a file
ENDS = 2**12  # bytes at either end of a file that, with its size, tell it from others
LOOKS = 4096  # files that are remembered, for rows that share a picture
HOPELESS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)
HOPELESS += (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # all other errors may pass
T = TypeVar("T")


class Paths(NamedTuple):
    """The files of the pictures beside the words; '' where there is none."""

    image: str = ""  # to change
    mask: str = ""  # of it
    control: tuple[str, ...] = ()  # one for each ControlNet
    image_prompts: tuple[str, ...] = ()  # one for each IP-Adapter

    @property
    def laid(self) -> list[str]:
        """Those that lie over each other, and over the picture that is drawn."""
        return [path for path in (self.image, self.mask, *self.control) if path]

    @property
    def each(self) -> list[str]:
        """All that there are."""
        return [*self.laid, *self.image_prompts]

    def told(self) -> dict[str, str]:
        """Under the names of GenerateConfig."""
        files = {"control_image": ",".join(self.control), "image_prompt": ",".join(self.image_prompts)}
        return {"image": self.image, "mask": self.mask, **files}


class Look(NamedTuple):
    """What a file tells without its pixels."""

    width: int  # as seen
    height: int
    mark: str  # other contents have another


class Seen(NamedTuple):
    """The pictures of a row, by the looks of their files."""

    height: int | None  # to draw at; None: they do not say
    width: int | None
    masked: bool | None  # whether the picture to change has a mask; None: there is none to change
    mark: str


def of_flags(config: GenerateConfig) -> Paths:
    control, image_prompts = config.pictures_of("controlnet"), config.pictures_of("ip_adapter")
    return Paths(config.image, config.mask, control, image_prompts)


def check_flags(config: GenerateConfig) -> None:
    """UserError where a file of --image, --mask, ... cannot be read, or they do not fit."""
    paths = of_flags(config)
    if config.image:
        looked(paths)
    else:  # rows name the picture
        looked(paths._replace(mask=""))
        if paths.mask:
            _of(paths.mask, _look)


def stand_in(height: int, width: int, masked: bool | None, controls: int = 0, prompts: int = 0) -> Given:
    """For pictures that are not read yet: of their shape, without their pixels.

    Args:
      masked: whether the picture to change has a mask; None: there is no picture.
      controls: pictures for ControlNets; prompts: for IP-Adapters.
    """
    picture = np.broadcast_to(np.uint8(0), (height, width, 3))
    mask = np.broadcast_to(np.float32(0), (height, width))
    image = None if masked is None else picture
    return Given(image, mask if masked else None, (picture,) * controls, (picture,) * prompts)


def looked(paths: Paths) -> Look | None:
    """At all of them; returns the one that decides on the size, if there is any.

    Raises:
      UserError: a file cannot be read, or they are of different sizes.
    """
    looks = [_of(path, _look) for path in paths.each]
    _check_sizes(paths, looks)
    return looks[0] if paths.laid else None


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


class Shown(NamedTuple):
    """What the networks beside the model are shown of their pictures."""

    kinds: tuple[str, ...] = ()  # to each ControlNet, see engine.sights
    prepared: tuple[PixelsConfig, ...] = ()  # for each IP-Adapter


def shown_by(config: GenerateConfig, pipe: Pipeline) -> Shown:
    """To a ControlNet what it has learned to see, unless the config says otherwise."""
    asked = {"none": ""}.get(config.control_kind, config.control_kind)
    kinds = tuple(asked if config.control_kind else kind for kind in controls.kinds(pipe.programs.nets))
    return Shown(kinds, tuple(map(adapters.prepared_for, pipe.programs.adapters)))


def read(paths: Paths, height: int, width: int, shown: Shown) -> Given:
    """The pictures, all that there are; but for prompts, scaled to fill height x width and cropped alike.

    Raises:
      UserError: a file cannot be read.
    """
    try:
        return _read(paths, height, width, shown)
    except OSError as error:
        raise UserError(f"{error.filename or paths.each[0]}: {error.strerror or error}") from None


def _read(paths: Paths, height: int, width: int, shown: Shown) -> Given:
    """The same; what may pass, as a network that fails, is an OSError."""

    def pixels(file: BinaryIO, alpha: bool = True) -> np.ndarray:
        return read_pixels(io.BytesIO(file.read()), width, height, Crop(), alpha)  # trouble is no damage

    def control(path: str, kind: str) -> np.ndarray:
        # As in diffusers: where a map of edges or poses is transparent, its colours count all the same.
        return sights.seen(kind, _of(path, functools.partial(pixels, alpha=bool(kind)), passing=True))

    def prompt(path: str, prepared: PixelsConfig) -> np.ndarray:
        return fitted(_of(path, _whole, passing=True), prepared)

    image = _of(paths.image, pixels, passing=True) if paths.image else None
    mask = _of(paths.mask, pixels, passing=True).astype(np.float32).mean(-1) / 255 if paths.mask else None
    controls = tuple(map(control, paths.control, shown.kinds))
    return Given(image, mask, controls, tuple(map(prompt, paths.image_prompts, shown.prepared)))


def _whole(file: BinaryIO) -> np.ndarray:
    """A picture of its own size."""
    content = io.BytesIO(file.read())
    header = read_header(content, SETTINGS_KEY)
    content.seek(0)
    return read_pixels(content, header.width, header.height, Crop())


def _look(file: BinaryIO) -> Look:
    header = read_header(file, SETTINGS_KEY)  # type: ignore[arg-type]
    length = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256(f"{length} ".encode())
    for start in (0, max(length - ENDS, 0)):
        file.seek(start)
        digest.update(file.read(ENDS))
    return Look(header.width, header.height, digest.hexdigest()[:16])


def _check_sizes(paths: Paths, looks: Sequence[Look]) -> None:
    """UserError where pictures of these looks do not lie over each other, or are too long.

    Args:
      looks: of `paths.each`.
    """
    count = len(paths.laid)
    for path, look in zip(paths.image_prompts, looks[count:], strict=True):
        adapters.check_sides(look.height, look.width, f"{path}, an image prompt")
    for path, look in list(zip(paths.laid, looks[:count], strict=True))[1:]:
        first, (width, height) = paths.laid[0], looks[0][:2]
        sizes = f"{path} has {look.width} x {look.height} pixels, and the picture {first} {width} x {height}"
        if path == paths.mask and look[:2] != (width, height):
            raise UserError(f"{sizes}: a mask is as large as its picture, white where it is drawn anew")
        # a control picture may be larger or smaller, but for a pixel of rounding
        if abs(look.width * height - look.height * width) > max(look.width, look.height, width, height):
            raise UserError(f"{sizes}: pictures that belong together have the same proportions")


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
        self._folder = config.rows_folder
        self._base = os.path.realpath(self._folder)
        self._shown = shown_by(config, pipe)
        self._look = functools.lru_cache(LOOKS)(self._look_at)
        self._usual = {m: edits.default_strength(stand_in(1, 1, m), pipe.made_for) for m in (True, False)}

    def paths(self, row: Row) -> Paths:
        """As they can be opened, and as pictures remember them."""
        config = self._config
        image = config.image if row.image is None else self._path(row.image)
        mask = config.mask if row.mask is None else self._path(row.mask)
        control, image_prompts = self._pictures(row, "controlnet"), self._pictures(row, "ip_adapter")
        return Paths(image, mask if image else "", control, image_prompts)

    def _pictures(self, row: Row, of: str) -> tuple[str, ...]:
        """Those for the networks of a kind of PICTURED."""
        own = getattr(row, PICTURED[of].picture)
        if own is None:
            return self._config.pictures_of(of)
        return tuple(map(self._path, self._config.pictures_of(of, own)))

    def _path(self, own: str) -> str:
        # No home, whatever the name begins with
        return os.path.join(self._folder or ("." if own.startswith("~") else ""), own) if own else ""

    def look_ahead(self, rows: Iterable[Row], threads: Executor) -> None:
        """Looks at the files of these rows, many at once, so that `seen` need not wait for the disk.

        Raises:
          UserError: trouble that may pass, as a network that fails.
        """
        # what leads out of the folder, or names too few, is refused where it is seen
        sound = (row for row in rows if not self._wrong(row))
        paths = {path: None for row in sound for path in self.paths(row).each}
        for _ in threads.map(self._look, paths):
            pass

    def seen(self, row: Row) -> Seen | str | None:
        """The pictures of a row, or why it cannot be drawn; None where it has none.

        Raises:
          UserError: trouble that may pass.
        """
        if why := self._wrong(row):
            return why
        paths = self.paths(row)
        if not paths.image:
            alone = {name: getattr(row, name) for name in ("mask", "strength", "image_guidance_scale")}
            named = [
                f"{name}={str(value)[:SHOWN]}" for name, value in alone.items() if value not in (None, "")
            ]
            if named:
                return f"{named[0]} without a picture: write its image, too"
        if not paths.each:
            return None
        if why := self._astray(row, self._base):
            return why
        looks = [self._look(path) for path in paths.each]
        if faults := [look for look in looks if isinstance(look, str)]:
            return faults[0]
        try:
            _check_sizes(paths, looks)
        except UserError as error:
            return str(error)
        asked = row.height or self._config.height, row.width or self._config.width
        masked = bool(paths.mask) if paths.image else None
        if paths.laid:
            asked = size(looks[0], self._pipe, *asked)
        return Seen(*asked, masked, "".join(look.mark for look in looks))

    def read(self, row: Row, height: int, width: int) -> Given:
        """The pixels of a row that has a picture.

        Raises:
          UserError: it cannot be drawn.
          OSError: trouble that may pass.
        """
        if why := self._astray(row, self._base):
            raise UserError(why)
        return _read(self.paths(row), height, width, self._shown)

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

    def _wrong(self, row: Row) -> str:
        """Why the paths of a row are none, without a look at the disk; '' if they are."""
        try:
            own = [self._pictures(row, of) for of, each in PICTURED.items() if getattr(row, each.picture)]
        except UserError as error:
            return str(error)
        if any(len(files) > 1 for files in own) and "," in self._folder:
            return f"{self._folder} has a comma in its name, which parts pictures: rename it"
        return self._astray(row, None)

    def _astray(self, row: Row, base: str | None) -> str:
        """Why a path in a row is none below its folder; base: as `astray` has it."""
        for name in PATHS:
            own = getattr(row, name) or ""
            of = next((of for of, each in PICTURED.items() if each.picture == name), None)
            for path in self._config.pictures_of(of, own) if of else (own,):
                if path and (why := astray(path, base)):
                    return f"{name}={path[:SHOWN]!r} {why}"
        return ""
