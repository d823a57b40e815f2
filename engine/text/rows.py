"""Rows of prompt files, for pictures by the million: what each asks for, or why it cannot be drawn.

A file is read once, from front to back. Each row is checked, brought into a form that is the same for all
formats, and put into a temporary file as a line of JSON; from there it is read again whenever it is wanted,
in any order and by any thread.

Memory: 12 bytes a row; while the file is read 8 more (a hash of the row's id), and at its end, for rows that
have ids, another 50 for a moment. Disk, in the folder of temporary files: the size of the file as JSON.
"""

import array
import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from engine.errors import UserError
from engine.text.row_files import (
    FOREIGN,
    MAX_COLUMNS,
    MAX_DEPTH,
    NUMBERS,
    PATHS,
    SHOWN,
    TEXTS,
    Given,
    meant,
    no_prompt,
    open_rows,
    plain,
    too_many_columns,
)
from engine.text.row_paths import astray

MAX_LETTERS = {"prompt": 100_000, "negative_prompt": 100_000, "id": 1000, "sampler": 100, "lora": 4096}
MAX_LETTERS |= dict.fromkeys(PATHS, 4096)
# What is wrong with any model; jobs judge the rest when the model is known.
WHOLE_NUMBERS = {
    "seed": (0, 2**64 - 1),
    "index": (0, 2**32 - 1),
    "steps": (1, 2**31 - 1),
    "height": (1, 2**31 - 1),
    "width": (1, 2**31 - 1),
}
SCALES = ("guidance_scale", "strength", "image_guidance_scale")
MAX_EXACT = 2**53  # up to here a float holds every whole number
MAX_EXTRA = 2**16  # bytes of JSON
MAX_WARNINGS = 12
WRITE_AT_ONCE = 2**20  # bytes


Hashes = Integer[np.ndarray, " rows"]


class Row(NamedTuple):
    """A row to draw. What is None is for the options of the job to say."""

    number: int  # its place among the rows of the file, from 0
    id: str  # the row's own, or else its number
    prompt: str
    extra: dict[str, Any]  # all other columns, as they fit into JSON
    negative_prompt: str | None = None
    seed: int | None = None
    index: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    sampler: str | None = None
    lora: str | None = None  # as in the option of that name; "": none, whatever the job says
    image: str | None = None  # a path from the folder of the file on; "": none, whatever the job says
    mask: str | None = None  # likewise
    strength: float | None = None
    image_guidance_scale: float | None = None
    control_image: str | None = None  # paths as in the option of that name,
    image_prompt: str | None = None  # and in this


class Rejected(NamedTuple):
    """A row that cannot be drawn, whatever the model."""

    number: int
    id: str
    reason: str  # one line: what is wrong, and what to write instead


class Rows:
    """All rows of a file, by number. Any thread may read them; `read_rows` makes and closes them.

    Attributes:
      columns: name (its beginning, where it is long) -> whether its values are read or carried through. The
        first MAX_COLUMNS of the file.
      digest: SHA-256 of the rows in their common form. Equal rows have equal digests in any format.
    """

    columns: dict[str, bool]
    digest: str

    def __init__(self, spool: Any):
        self.columns = {}
        self._spool = spool  # a raw binary file
        self._starts = array.array("Q")  # of each row's line
        self._sizes = array.array("I")
        self._end = 0  # of the last line
        self._waiting = bytearray()  # lines that are not written yet

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Row | Rejected:
        number = range(len(self))[number]
        start, size = self._starts[number], self._sizes[number]
        # pread has no position that threads could move under each other.
        given = json.loads(os.pread(self._spool.fileno(), size, start).decode())
        given.setdefault("id", str(number))
        if "reason" in given:
            return Rejected(number, **given)
        given.setdefault("extra", {})
        return Row(number, **given)

    def fill(self, source: Iterator[Given]) -> None:
        """Takes in all rows of a file."""
        digest, ids = hashlib.sha256(), array.array("q")
        for given in source:
            if isinstance(given, dict):
                self._note(given)
            line, id = _line(given)
            digest.update(line)
            ids.append(hash(id) if id else 0)
            self._starts.append(self._end)
            self._sizes.append(len(line))
            self._write(line)
        self._flush()
        self.digest = digest.hexdigest()
        for numbers in _alike(_named(ids)):
            self._reject_repeated(numbers)
        self._flush()

    def _note(self, given: dict[str, Any]) -> None:
        """Remembers the names of columns; not all, where each row has new ones."""
        if len(self.columns) < MAX_COLUMNS and not given.keys() <= self.columns.keys():
            for name in given:
                self.columns.setdefault(name[:SHOWN], True)
                if len(self.columns) >= MAX_COLUMNS:
                    return

    def _reject_repeated(self, numbers: list[int]) -> None:
        firsts: dict[str, int] = {}  # of each id: rows of one hash may have several
        for number in numbers:
            row = self[number]
            first = firsts.setdefault(row.id, number)
            if first != number and isinstance(row, Row):
                reason = f"id {row.id[:SHOWN]!r} is that of row {first} already; give each row its own"
                line = _encode({"id": row.id, "reason": reason})
                self._starts[number], self._sizes[number] = self._end, len(line)
                self._write(line)

    def _write(self, line: bytes) -> None:
        self._waiting += line
        self._end += len(line)
        if len(self._waiting) >= WRITE_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        rest = memoryview(bytes(self._waiting))
        self._waiting.clear()
        try:
            while rest:
                rest = rest[self._spool.write(rest) :]
        except OSError as error:
            raise _no_room(error) from None


@contextlib.contextmanager
def read_rows(path: str | os.PathLike[str], stdin: Any) -> Iterator[Rows]:
    """The rows of a .txt, .jsonl, .csv or .parquet file, checked one by one.

    txt: a prompt a line, without blank lines and those that begin with #. What is null, or an empty cell of
    CSV or Parquet, is not given. Numbers may be whole floats (7.0): pandas makes them. An id may be given
    once; later rows that give it again are Rejected. Columns that Row has no place for go into its `extra`;
    those of Parquet that do not fit into JSON (bytes, dates) are left out, and `unread_columns` says so.

    Args:
      path: of the file, or - for `stdin`.
      stdin: a binary stream; JSON where its first line begins with {, else a prompt a line.

    Raises:
      UserError: the file as a whole cannot be read, or holds no row. A bad row is Rejected, no more.
    """
    path = os.fspath(path)
    with _spool() as spool:
        rows = Rows(spool)
        with open_rows(path, stdin) as source:
            rows.columns |= {name[:SHOWN]: False for name in source.left_out}
            rows.fill(source.rows)
        if not rows:
            where = "standard input" if path == "-" else path
            raise UserError(f"{where}: no prompt in it; write at least one row")
        yield rows


def _spool() -> Any:
    """A temporary file without a name and without a buffer: what cannot be written is known at once."""
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise _no_room(error) from None


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"the rows do not go into the folder of temporary files ({error.strerror}); "
        "set TMPDIR to a folder with more room"
    )


def _named(ids: "array.array[int]") -> Hashes:
    """Where some rows have an id (a hash other than 0), the others are called by their numbers."""
    hashes = np.frombuffer(ids, np.int64)
    if hashes.any():
        for number in np.flatnonzero(hashes == 0):
            ids[number] = hash(str(number))
    return hashes


def _alike(hashes: Hashes) -> Iterator[list[int]]:
    """Rows of one hash, in the order of the file, where there are several. Hash 0: the row has no id."""
    given = np.flatnonzero(hashes)
    order = given[np.argsort(hashes[given], kind="stable")]  # equal ones side by side, as in the file
    starts = np.flatnonzero(np.diff(hashes[order], prepend=0))  # none is 0
    sizes = np.diff(starts, append=len(order))
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        yield order[start : start + size].tolist()


# ---- one row

# Not ASCII alone: so text that is no Unicode cannot pass. Sorted: the order of columns is no difference.
_to_json = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, sort_keys=True, separators=(",", ":")
).encode


def _encode(value: Any) -> bytes:
    return _to_json(value).encode() + b"\n"


def _line(given: Given) -> tuple[bytes, str | None]:
    """A row in its common form, good or rejected, and its own id."""
    try:
        if isinstance(given, str):
            raise UserError(given)
        row = _checked(given)
        return _encode_row(row), row.get("id")
    except UserError as error:
        id = _id_of(given)
        return _encode({"reason": str(error)} | ({} if id is None else {"id": id})), id


def _encode_row(row: dict[str, Any]) -> bytes:
    try:
        line = _encode(row)
    except UnicodeEncodeError:
        raise UserError("a character that is not Unicode text; save the file as UTF-8") from None
    except ValueError:
        raise UserError("a number that is not finite; leave it out") from None
    # The line is longer than its extra, and mostly short enough by far.
    if len(line) > MAX_EXTRA and len(extra := _encode(row.get("extra", {}))) > MAX_EXTRA + 1:
        raise UserError(f"{len(extra) - 1} bytes in columns to carry through; write at most {MAX_EXTRA}")
    return line


def _id_of(given: Given) -> str | None:
    """The id of a row that is bad otherwise, if it has a good one."""
    try:
        if isinstance(given, str) or given.get("id") is None:
            return None
        id = _text("id", given["id"])
        id.encode()
    except (UserError, UnicodeEncodeError):
        return None
    return id


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """What is given in a row, by column; all other columns under `extra`."""
    if len(given) > MAX_COLUMNS:
        raise UserError(too_many_columns(len(given)))
    row, extra = {}, {}
    for name, value in given.items():
        if value is None:
            continue
        if name in TEXTS:
            row[name] = _text(name, value)
        elif name in NUMBERS:
            row[name] = _scale(name, value) if name in SCALES else _whole(name, value)
        elif name in PATHS:
            row[name] = _path(name, value)
        elif name not in FOREIGN:
            extra[name] = value
        elif value != "":
            raise UserError(f"{name} is not read: write a picture to change under 'image', or leave it out")
    if not row.get("prompt", "").strip():
        raise UserError("no prompt" if "prompt" in given else no_prompt(given))
    if any(map(_is_deep, extra.values())):
        raise UserError(f"lists or objects nested more than {MAX_DEPTH} deep; write flat ones")
    return row | {"extra": extra} if extra else row


def _text(name: str, value: Any) -> str:
    if name == "id" and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{name}={_shown(value)}: write a text")
    if len(value) > MAX_LETTERS[name]:
        raise UserError(f"{name} of {len(value)} characters; write at most {MAX_LETTERS[name]}")
    if name == "id" and not value:
        raise UserError("id=''; leave it out, or write at least one character")
    return value


def _path(name: str, value: Any) -> str:
    if value is True or isinstance(value, dict):  # True: in Parquet
        raise UserError(f"{name}: a picture inside of the file; write the path of its own file")
    if why := astray(path := _text(name, value)):
        raise UserError(f"{name}={path[:SHOWN]!r} {why}")
    return path


def _whole(name: str, value: Any) -> int:
    low, high = WHOLE_NUMBERS[name]
    # pandas makes 7.0 of 7 in a column where some cells are empty.
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name}={_shown(value)}: write a whole number, {low} to {high}")
    return value


def _scale(name: str, value: Any) -> float:
    """A finite number, always as a float, so that 5 and 5.0 are the same row."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    raise UserError(f"{name}={_shown(value)}: write a number")


def _shown(value: Any) -> str:
    """A value for messages: short, printable, and as JSON has it."""
    if isinstance(value, str):
        return f"{value[:SHOWN]!r} (a text)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value!r:.{SHOWN}}"
    return "an object" if isinstance(value, dict) else "a list"


def _is_deep(value: Any, depth: int = 1) -> bool:
    if not isinstance(value, list | dict):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return depth > MAX_DEPTH or any(_is_deep(one, depth + 1) for one in inside)


# ---- columns


def unread_columns(columns: Mapping[str, bool]) -> list[str]:
    """Warnings, a line each: columns that are carried through but look as if they were meant to be read, and
    columns that are left out.

    Args:
      columns: as Rows has them.
    """
    known = TEXTS + NUMBERS + PATHS
    missing = [name for name in known if name not in columns]
    warnings = []
    for name, carried in columns.items():
        if name in known or name in FOREIGN:
            continue
        shown = f"column {name[:SHOWN]!r}"
        # A word that only looks like a column that is there already is no slip of the pen.
        near = meant(name, known if plain(name) in known else missing)
        if not carried:
            warnings.append(f"{shown} is left out: it holds no text, numbers or lists of them")
        elif near:
            warnings.append(f"{shown} is carried through, not read{near}")
    more = len(warnings) - MAX_WARNINGS
    return [*warnings[:MAX_WARNINGS], f"and {more} columns more of this kind"] if more > 0 else warnings
