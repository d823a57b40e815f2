"""Files of rows, one reader for each format: .txt, .jsonl, .csv and .parquet, and standard input.

A reader gives each row as it stands there: a dict from column to value (None: not given), or, for what cannot
be read as a row, a text that says why. Files come from anywhere, so one bad row never stops the others, and
the memory that it takes is bounded: by MAX_LINE, or in Parquet by a page of each column.
"""

import collections
import contextlib
import csv
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from engine.config import nearest
from engine.errors import UserError

TEXTS = ("prompt", "id", "negative_prompt", "sampler", "lora")
NUMBERS = ("seed", "index", "steps", "guidance_scale", "height", "width", "strength", "image_guidance_scale")
PATHS = ("image", "mask", "control_image", "image_prompt")  # of pictures, from the folder of the file on
FOREIGN = ("init_image",)  # of pictures, too, in other programs; not read
PICTURES = PATHS + FOREIGN
# What other programs call our columns, where the word is too far from ours to be found by its letters.
MEANT = {
    "caption": "prompt",
    "text": "prompt",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "num_inference_steps": "steps",
    "scheduler": "sampler",
    "mask_image": "mask",
    "denoising_strength": "strength",
}

MAX_LINE = 2**24  # bytes
MAX_LINES = 10_000  # of a row in CSV, where texts in quotes may hold ends of lines
MAX_COLUMNS = 1000
SHOWN = 60  # characters of a name or a value in messages
MAX_DEPTH = 32  # of lists and objects in each other
BYTES_AT_ONCE = 2**25  # of Parquet
MAX_ROWS_AT_ONCE = 256  # likewise: texts that are there many times are stored, and counted, but once

WHAT_TO_WRITE = "write a file that ends in .txt, .jsonl, .csv or .parquet, or - for standard input"
TOO_LONG = f"a line of more than {MAX_LINE >> 20} MiB; write one row a line"
NOT_UTF8 = "not UTF-8; save the file as UTF-8 text"
WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")  # Python converts up to 4300 digits
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

Given = dict[str, Any] | str  # a row as it stands in the file, or why it is none


class Source(NamedTuple):
    """An open file of rows."""

    rows: Iterator[Given]
    left_out: Sequence[str] = ()  # columns whose values cannot be carried into JSON


@contextlib.contextmanager
def open_rows(path: str, stdin: Any) -> Iterator[Source]:
    """Opens the file, or takes `stdin` (bytes) where the path is '-'.

    Raises:
      UserError: the file cannot be read, its name has another suffix, or its header is of no use.
    """
    if path == "-":
        yield _from_content(_lines(stdin, "standard input"))
        return
    with _open(path) as file:
        suffix = pathlib.Path(path).suffix.lower()
        if suffix not in READERS:
            raise UserError(f"{path}: the suffix {suffix!r:.{SHOWN}} is unknown; {WHAT_TO_WRITE}")
        yield READERS[suffix](file, path)


def _open(path: str) -> BinaryIO:
    try:
        return open(os.path.expanduser(path), "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {WHAT_TO_WRITE}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {WHAT_TO_WRITE}") from None
    except ValueError:  # a NUL in it
        raise UserError(f"{path[:SHOWN]!r} is no path; {WHAT_TO_WRITE}") from None


def _from_content(lines: Iterator[bytes | None]) -> Source:
    first = next((line for line in lines if line is None or line.strip()), b"")
    lines = itertools.chain([first], lines)
    is_json = first is not None and first.lstrip().startswith(b"{")
    return Source(_each_line(lines, _object_of if is_json else _prompt_of))


def _lines(file: Any, where: str) -> Iterator[bytes | None]:
    """Lines, split at \\n only: prompts may hold U+2028 or form feeds. None for one that is too long."""
    try:
        line = file.readline(MAX_LINE + 1)
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{where}: UTF-16; save the file as UTF-8 text")
        line = line.removeprefix(b"\xef\xbb\xbf")
        while line:
            if len(line) > MAX_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                    pass
                yield None
            else:
                yield line
            line = file.readline(MAX_LINE + 1)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; copy the file to another disk") from None


# ---- a row a line: a prompt, or a JSON object


def _each_line(lines: Iterator[bytes | None], parse: Callable[[bytes], Given | None]) -> Iterator[Given]:
    for line in lines:
        if line is None:
            yield TOO_LONG
        elif line := line.strip():
            try:
                given = parse(line)
            except UnicodeDecodeError:
                given = NOT_UTF8
            if given is not None:
                yield given


def _prompt_of(line: bytes) -> Given | None:
    if line.startswith(b"#"):
        return None
    prompt = line.decode().strip()
    return {"prompt": prompt} if prompt else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise UserError(f"{name[:SHOWN]!r} stands there twice; leave out one")
    return found


def _constant(name: str) -> None:
    raise UserError(f"{name} is no JSON; write a number, or null")


_decode = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_constant).decode


def _object_of(line: bytes) -> Given:
    text = line.decode()
    try:
        row = _decode(text)
    except json.JSONDecodeError as error:
        return f"invalid JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        return "lists or objects nested too deep; write flat ones"
    except UserError as error:
        return str(error)
    except ValueError:  # Python converts no longer ones: the time grows with the square of the length
        return "a number of more than 4300 digits; write it as text"
    return row if isinstance(row, dict) else 'no JSON object; write one a line, such as {"prompt": "a fox"}'


# ---- CSV


class _Again:
    """Lines for the csv module. Where a row fails, all but its first line can be read again.

    A quote that is never closed makes the rows below it part of its own; this gives them back. It stays
    linear: a line that opens such a quote ends the one before it, so lines are read twice at most.
    """

    def __init__(self, lines: Iterator[bytes | None]):
        self._lines = lines
        self._ahead: collections.deque[bytes | None] = collections.deque()
        self._taken: list[bytes | None] = []
        self._size = 0

    def __iter__(self) -> "_Again":
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._lines)
        self._taken.append(line)
        self._size += len(line or b"")
        if line is None:
            raise csv.Error(TOO_LONG)
        if len(self._taken) > 1 and (self._size > MAX_LINE or len(self._taken) > MAX_LINES):
            raise csv.Error("a text that does not end")
        # Bytes that are no UTF-8 become what the check of the row refuses; the other rows stay good.
        return line.decode("utf-8", "surrogateescape")

    def begin_row(self) -> None:
        self._taken, self._size = [], 0

    def give_back(self) -> None:
        self._ahead.extendleft(reversed(self._taken[1:]))


def _records(lines: Iterator[bytes | None]) -> Iterator[list[str] | str]:
    """Cells of each row that is not blank, or why there are none."""
    # The limit is one for the whole process: raised, never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    again = _Again(lines)
    reader = csv.reader(again, strict=True)
    while True:
        again.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            again.give_back()
            yield f"invalid CSV ({error}); close every quote, and double those inside of a text"
        else:
            if cells:
                yield cells


def _read_csv(file: Any, where: str) -> Source:
    records = _records(_lines(file, where))
    header = next(records, [])
    if TOO_LONG in header:  # columns without number: as where there are too many, each row says so
        reason = f"a header of more than {MAX_LINE >> 20} MiB; write at most {MAX_COLUMNS} columns"
        return Source(reason for _ in records)
    if isinstance(header, str):
        raise UserError(f"{where}: the first line is {header}")
    names = [name.strip() for name in header]
    if len(names) > MAX_COLUMNS:
        return Source(too_many_columns(len(names)) for _ in records)
    if len(names) == 1 and re.search(r"[;\t]", names[0]):
        raise UserError(f"{where}: separate the columns with commas")
    check_header(names, where)
    left_out = [""] if "" in names else []  # pandas writes its row labels so
    return Source(_read_cells(names, records), left_out)


def _read_cells(names: list[str], records: Iterable[list[str] | str]) -> Iterator[Given]:
    for cells in records:
        if isinstance(cells, str):
            yield cells
        elif len(cells) != len(names):
            yield f"{len(cells)} cells, the header has {len(names)}; put texts with commas in quotes"
        else:
            yield {name: _cell(name, text) for name, text in zip(names, cells, strict=True) if name}


def _cell(name: str, text: str) -> Any:
    """A cell's value: a number in the columns of numbers, if it is one."""
    if not text:
        return None
    if name not in NUMBERS:
        return text
    text = text.strip()
    if WHOLE.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else text


def check_header(names: Sequence[str], where: str) -> None:
    """Raises UserError where a name stands twice, is no text, or where none is prompt."""
    counts = collections.Counter(name for name in names if name)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{where}: column {twice[0][:SHOWN]!r} stands there twice; leave out one")
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the first line is {NOT_UTF8}") from None
    if names and "prompt" not in counts:
        raise UserError(f"{where}: {no_prompt(names)}; name the column of the prompts 'prompt'")


def no_prompt(names: Iterable[str]) -> str:
    """That there is none among the names, and which of them may be meant."""
    name = next((name for name in names if name != "prompt" and meant(name, ["prompt"])), None)
    return "no prompt" if name is None else f"no prompt (is it {name[:SHOWN]!r}?)"


def meant(name: str, columns: Iterable[str]) -> str:
    """' (did you mean X?)' for the one of `columns` that a name is nearly, or in other programs' words."""
    return nearest(MEANT.get(plain(name), plain(name)), columns)


def plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name[:SHOWN].strip().lower())


def too_many_columns(count: int) -> str:
    return f"{count} columns; write at most {MAX_COLUMNS}"


# ---- Parquet


def _read_parquet(file: Any, where: str) -> Source:
    pa = _pyarrow(where)
    try:
        # With its own buffers, Arrow would hold whole columns of a row group.
        table = pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        schema = table.schema_arrow
        names = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: no Parquet file, or a damaged one ({str(error)!r:.200})") from None
    if len(names) > MAX_COLUMNS:
        return Source(too_many_columns(len(names)) for _ in _read_batches(pa, table, names[:1], where))
    check_header(names, where)
    unfit = [field for field in schema if field.name not in PICTURES and not _fits_json(pa, field.type)]
    for field in unfit:
        if field.name in TEXTS + NUMBERS:
            kind = f"{str(field.type)!r:.{SHOWN}}"
            raise UserError(f"{where}: column {field.name} is of type {kind}; write texts or numbers")
    left_out = [field.name for field in unfit]
    names = [name for name in names if name not in left_out]
    return Source(_read_batches(pa, table, names, where), left_out)


def _read_batches(pa: Any, table: Any, names: Sequence[str], where: str) -> Iterator[Given]:
    batches = table.iter_batches(_rows_at_once(table.metadata), columns=names, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{where}: a damaged Parquet file ({str(error)!r:.200})") from None
        if batch is None:
            return
        yield from _read_batch(pa, _without_pictures(pa, batch))


def _rows_at_once(metadata: Any) -> int:
    """Few where rows are large, as those with pictures are."""
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(1, min(MAX_ROWS_AT_ONCE, BYTES_AT_ONCE * metadata.num_rows // max(size, 1)))


def _without_pictures(pa: Any, batch: Any) -> Any:
    """True in place of each picture that is no path: that it is there is all that counts."""
    for i, field in enumerate(batch.schema):
        if field.name in PICTURES and not _is_text(pa, field.type):
            there = pa.compute.if_else(batch.column(i).is_valid(), True, pa.scalar(None, pa.bool_()))
            batch = batch.set_column(i, field.name, there)
    return batch


def _read_batch(pa: Any, batch: Any) -> Iterator[Given]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # one at a time, so that one alone is lost
        if len(batch) == 1:
            yield NOT_UTF8
            return
        for i in range(len(batch)):
            yield from _read_batch(pa, batch.slice(i, 1))
        return
    for row in rows:
        yield {name: None if _is_empty(name, value) else value for name, value in row.items()}


def _is_empty(name: str, value: Any) -> bool:
    """Of a cell: an empty text, or NaN, which pandas writes for nothing, in a column that is not ours."""
    return value == "" or (value != value and name not in NUMBERS)


def _is_text(pa: Any, type: Any) -> bool:
    if pa.types.is_dictionary(type):  # a category of pandas
        return _is_text(pa, type.value_type)
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def _fits_json(pa: Any, type: Any, depth: int = 0) -> bool:
    """Whether all values of the type have their like in JSON. Bytes and dates have not."""
    is_one = pa.types
    if depth > MAX_DEPTH:
        return False
    if is_one.is_list(type) or is_one.is_large_list(type) or is_one.is_dictionary(type):
        return _fits_json(pa, type.value_type, depth + 1)
    if is_one.is_struct(type):
        fields = [type.field(i) for i in range(type.num_fields)]
        once = len({field.name for field in fields}) == len(fields)
        return once and all(_fits_json(pa, field.type, depth + 1) for field in fields)
    simple = (is_one.is_integer, is_one.is_floating, is_one.is_boolean, is_one.is_null)
    return _is_text(pa, type) or any(is_simple(type) for is_simple in simple)


def _pyarrow(where: str) -> Any:
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{where}: needs a package; write pip install 'fogsculpt[jobs]'") from None
    return pyarrow


READERS = {
    ".txt": lambda file, where: Source(_each_line(_lines(file, where), _prompt_of)),
    ".jsonl": lambda file, where: Source(_each_line(_lines(file, where), _object_of)),
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
