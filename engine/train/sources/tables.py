"""Parquet: a column `image` of pictures' bytes, as Hugging Face datasets and our jobs write it, and captions;
for a ControlNet that is trained on it, a column `conditioning_image`, too.

Parquet is read in groups of rows, and for a picture in the middle all of its group; in shuffled order that
would be most of the work. So all pictures are copied once, when a run begins, into a file without structure
in the folder of temporary files (TMPDIR), which is as large as they are together and goes with the program.
"""

import functools
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from engine.train.sources.item import CAPTIONS, CONTROL, Item, Unusable, caption_of, open_part
from engine.types import UserError

ROWS_AT_ONCE = 16
IMAGE = "image"


class Entry(NamedTuple):
    name: str
    start: int = 0
    size: int = 0
    caption: str | None = None
    problem: str = ""
    control: tuple[int, int] | None = None  # where it begins, and its size


class Tables:
    """The rows of several files, one file after the other."""

    def __init__(self, paths: Sequence[str], field: str = "", controlled: bool = False):
        self._copy = tempfile.NamedTemporaryFile(prefix="fogsculpt-")  # noqa: SIM115, as long as this,
        weakref.finalize(self, self._copy.close)  # or if it is never collected, as the program
        self._entries: list[Entry] = []
        for path in paths:
            try:
                self._entries += self._read(path, field, controlled)
                self._copy.flush()
            except OSError as error:
                advice = "free some space, or write another folder into TMPDIR"
                raise UserError(f"{path}: cannot be copied: {error.strerror}; {advice}") from None

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, i: int) -> str:
        return self._entries[i].name

    def read(self, i: int) -> Item:
        entry = self._entries[i]
        if entry.problem:
            raise Unusable(entry.problem)
        control = functools.partial(open_part, self._copy.name, *entry.control) if entry.control else None
        return Item(open_part(self._copy.name, entry.start, entry.size), entry.caption, control)

    def _read(self, path: str, field: str, controlled: bool) -> Iterator[Entry]:
        place = 0
        for row in _rows(path, field, controlled):
            if isinstance(row, str):
                yield Entry(path, problem=row)
                return
            name, (image, text, control) = f"{path}/{place}", row
            place += 1
            try:
                caption = None if text is None else caption_of(text)
                if image is None:
                    raise Unusable("no picture")
            except Unusable as problem:
                yield Entry(name, problem=str(problem))
                continue
            own = self._written(image)
            yield Entry(name, *own, caption, control=None if control is None else self._written(control))

    def _written(self, data: bytes) -> tuple[int, int]:
        """Where data begin in the copy, and their size."""
        start = self._copy.tell()
        self._copy.write(data)
        return start, len(data)


def _rows(
    path: str, field: str, controlled: bool
) -> Iterator[tuple[bytes | None, bytes | None, bytes | None] | str]:
    """Picture, caption and control picture of each row; a text, at the end, where the rest cannot be read."""
    pa = _pyarrow(path)
    try:
        table = pa.parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
        schema = table.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"damaged or no Parquet ({' '.join(str(error).split())[:80]})"
        return
    captions = _caption_columns(pa, schema, field, path)
    pictures = [IMAGE, *([CONTROL] if controlled else [])]
    _check_bytes(pa, schema, pictures, path)
    batches = table.iter_batches(ROWS_AT_ONCE, columns=[*pictures, *captions], use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            yield f"damaged ({' '.join(str(error).split())[:80]}): what follows is lost"
            return
        if batch is None:
            return
        images, *controls = (_bytes(pa, batch.column(name)) for name in pictures)
        texts = [batch.column(name).cast(pa.string()).cast(pa.binary()).to_pylist() for name in captions]
        for i, picture in enumerate(images):
            caption = next((text[i] for text in texts if text[i] is not None), None)
            yield picture, caption, controls[0][i] if controls else None


def _bytes(pa: Any, column: Any) -> list[bytes | None]:
    """Of the pictures of a column."""
    if pa.types.is_struct(column.type):
        column = pa.compute.struct_field(column, "bytes")
    return column.to_pylist()


def _check_bytes(pa: Any, schema: Any, names: Sequence[str], path: str) -> None:
    for name in names:
        if name not in schema.names or not _holds_bytes(pa, schema.field(name).type):
            raise UserError(
                f"{path}: no column {name!r} of bytes; its columns are {', '.join(schema.names)[:200]}"
            )


def _caption_columns(pa: Any, schema: Any, field: str, path: str) -> list[str]:
    """Those that hold captions; none where they stand inside of the pictures."""
    if field and field not in schema.names:
        raise UserError(f"{path}: no column {field!r}; its columns are {', '.join(schema.names)[:200]}")
    wanted = (field,) if field else CAPTIONS
    found = [name for name in wanted if name in schema.names and _holds_text(pa, schema.field(name).type)]
    if field and not found:
        raise UserError(f"{path}: column {field!r} holds no texts; write another caption_field")
    return found


def _holds_text(pa: Any, type: Any) -> bool:
    if pa.types.is_dictionary(type):  # a category of pandas
        return _holds_text(pa, type.value_type)
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def _holds_bytes(pa: Any, type: Any) -> bool:
    if pa.types.is_struct(type):
        place = type.get_field_index("bytes")
        return place >= 0 and _holds_bytes(pa, type.field(place).type)
    return pa.types.is_binary(type) or pa.types.is_large_binary(type)


def _pyarrow(where: str) -> Any:
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{where}: needs a package; write pip install 'fogsculpt[jobs]'") from None
    return pyarrow
