"""What every source gives: pictures as open files, captions, and reasons where there is none."""

import io
import json
import os
import stat
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from engine.pixels import Unusable

CAPTIONS = ("caption", "text", "prompt")  # what the field is called, the first that is there
CONTROL = "conditioning_image"  # what the field of a control picture is called, as in diffusers' scripts
BESIDE = ".control"  # or where it lies: 1.control.png beside 1.png
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MAX_CAPTION = 2**17  # bytes of a caption
MAX_TEXT = 2**20  # bytes of a file with one
MAX_PICTURE = 2**28  # bytes of a picture's file

NO_CAPTION = "no caption"
NOT_UTF8 = "the caption is not UTF-8"


# a caption, None where there is none -> the caption to train on; raises Unusable
Accept = Callable[[str | None], str]


def required(caption: str | None) -> str:
    """The caption; Unusable without one."""
    if not caption:
        raise Unusable(NO_CAPTION)
    return caption


class Item(NamedTuple):
    file: io.BufferedIOBase  # of the picture; read no further than is asked for, to be closed
    caption: str | None  # None: it stands inside of the picture, if anywhere; "": there is none
    control: Callable[[], io.BufferedIOBase] | None = None  # opens what a ControlNet is to be shown


@runtime_checkable
class Source(Protocol):
    """Pictures in an order that depends on nothing but what is there. Threads may read at once."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Where the picture lies, for people."""
        ...

    def read(self, i: int) -> Item:
        """Raises Unusable."""
        ...


class Part(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file of its own."""

    def __init__(self, path: str, start: int, size: int):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115, closed with this
        self._start, self._size, self._place = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._place)
        data = self._file.read(min(len(buffer), max(0, self._size - self._place)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_part(path: str, start: int, size: int) -> io.BufferedIOBase:
    """Raises Unusable where it is too large for a picture, or cannot be opened."""
    check_size(size)
    try:
        return io.BufferedReader(Part(path, start, size))
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from None


def open_file(path: str) -> io.BufferedIOBase:
    """Raises Unusable for what is no file (a pipe would never end), or cannot be opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Unusable("no file")
        return open(path, "rb")
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from None
    except ValueError:  # a NUL or half a surrogate pair in the name
        raise Unusable("no path") from None


def open_picture(path: str) -> io.BufferedIOBase:
    """As `open_file`; Unusable for what is empty or too large as well."""
    file = open_file(path)
    try:
        check_size(os.fstat(file.fileno()).st_size)
    except Unusable:
        file.close()
        raise
    return file


def check_size(size: int) -> None:
    """Of the file of a picture; raises Unusable."""
    if size == 0:
        raise Unusable("an empty file")
    if size > MAX_PICTURE:
        raise Unusable(f"a file of {size >> 20} MiB; the most is {MAX_PICTURE >> 20}")


def read_text(file: io.BufferedIOBase) -> bytes:
    """All of a small file; Unusable where it is not small."""
    with file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise Unusable(f"a caption file of more than {MAX_TEXT >> 20} MiB")
    return data


def caption_of(text: Any) -> str:
    """A caption without the space around it, "" where there is none. Raises Unusable for one of no use."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise Unusable(NOT_UTF8) from None
    if text is None:
        return ""
    if not isinstance(text, str):
        raise Unusable("the caption is no text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # half a surrogate pair, from JSON
        raise Unusable("the caption is not valid Unicode") from None
    if size > MAX_CAPTION:
        raise Unusable(f"a caption of more than {MAX_CAPTION >> 10} KiB")
    return text.strip()


def caption_in(row: Any, field: str) -> str:
    """The caption of a JSON object or of a row; `field` as in DataConfig.caption_field."""
    if not isinstance(row, dict):
        raise Unusable("the caption's JSON is no object")
    names = (field,) if field else CAPTIONS
    return caption_of(next((row[name] for name in names if row.get(name) is not None), None))


def caption_in_json(data: bytes, field: str) -> str:
    """As `caption_in`, from bytes of JSON."""
    return caption_in(row_in_json(data), field)


def row_in_json(data: bytes) -> Any:
    """What bytes of JSON say. Raises Unusable where they are damaged."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unusable(NOT_UTF8) from None
    except (ValueError, RecursionError):
        raise Unusable("the caption's JSON is damaged") from None
