"""A folder of pictures, with captions in the way that is found first for each picture:

  metadata.jsonl   in its folder or one above: {"file_name": "a/1.png", "text": "a fox"}, a line each
  1.txt            beside 1.png
  1.json           beside it: {"caption": "a fox"}, or text, or prompt
  1.png            in its own settings, as `engine.finish` writes them

What a ControlNet that is trained is to be shown of a picture is named in its row of metadata.jsonl, as
"conditioning_image" or, for Hugging Face's datasets, "conditioning_image_file_name"; or it lies beside it as
1.control.png. Neither is a picture of its own then.

A row of metadata.jsonl names files below its folder and no others: neither `..` nor a link leads out of it,
since such files are often someone else's. Links to files that lie in the folder themselves are read.
"""

import io
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from engine.text.row_files import open_rows
from engine.text.row_paths import astray
from engine.train.sources.item import (
    BESIDE,
    CONTROL,
    PICTURES,
    Item,
    Unusable,
    caption_in,
    caption_in_json,
    caption_of,
    open_file,
    open_picture,
    read_text,
)

METADATA = "metadata.jsonl"
OTHERS = (".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif", ".heic", ".jxl")  # pictures that are not read
CONTROL_FIELDS = (CONTROL, f"{CONTROL}_file_name")


class Entry(NamedTuple):
    name: str  # a path from the folder on, or a row of a file
    caption: str | None = None  # None: beside the picture
    problem: str = ""  # why there is no picture
    control: str | None = None  # a path from the folder on; None: beside the picture, if anywhere
    astray: str = ""  # why that cannot be read


class Files:
    """A folder and those below it, in the order of the names; hidden ones are left out."""

    def __init__(self, root: str, field: str = "", controlled: bool = False):
        self._root, self._field, self._controlled = root, field, controlled
        self._beside: dict[str, str] = {}  # names of caption files, as they are where their suffix is small
        self._controls: dict[str, str] = {}  # name of a picture without its suffix -> that of 1.control.png
        self._entries = self._find()

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, i: int) -> str:
        return os.path.join(self._root, self._entries[i].name)

    def read(self, i: int) -> Item:
        entry = self._entries[i]
        if entry.problem:
            raise Unusable(entry.problem)
        caption = self._caption(entry.name) if entry.caption is None else entry.caption
        return Item(open_picture(self.name(i)), caption, self._control(entry))

    def _control(self, entry: Entry) -> Callable[[], io.BufferedIOBase] | None:
        name = entry.control or self._controls.get(os.path.splitext(entry.name)[0])
        if name is None:
            return None

        def opened() -> io.BufferedIOBase:
            if entry.astray:
                raise Unusable(entry.astray)
            return open_picture(os.path.join(self._root, name))

        return opened

    def _caption(self, name: str) -> str | None:
        stem = os.path.splitext(name)[0]
        for suffix in (".json", ".txt") if self._field else (".txt", ".json"):
            if (beside := self._beside.get(stem + suffix)) is not None:
                data = read_text(open_file(os.path.join(self._root, beside)))
                return caption_of(data) if suffix == ".txt" else caption_in_json(data, self._field)
        return None

    def _find(self) -> list[Entry]:
        names, problems = list_files(self._root)
        entries = [Entry(name, problem=problem) for name, problem in problems]
        for name in names:
            if os.path.basename(name) == METADATA:
                entries += self._rows(os.path.dirname(name))
        told = {name for entry in entries for name in (entry.name, entry.control)}
        stems = {os.path.splitext(name)[0] for name in names if name.lower().endswith(PICTURES)}
        for name in names:
            stem, suffix = os.path.splitext(name)
            suffix, of = suffix.lower(), stem[: -len(BESIDE)]
            beside = self._controlled and stem.lower().endswith(BESIDE) and of in stems
            if suffix in PICTURES and beside:
                self._controls[of] = name
            elif suffix in PICTURES and name not in told:
                entries.append(Entry(name))
            elif suffix in OTHERS and name not in told:
                entries.append(Entry(name, problem=f"{suffix} is not read: make it {', '.join(PICTURES)}"))
            elif suffix in (".txt", ".json"):
                self._beside[stem + suffix] = name
        return sorted(entries, key=lambda entry: (entry.name, entry.caption or ""))

    def _control_in(self, row: Any, folder: str, base: str) -> tuple[str | None, str]:
        """The control picture that a row names, if any, and why it cannot be read."""
        named = [field for field in CONTROL_FIELDS if row.get(field) is not None] if self._controlled else []
        try:
            return (os.path.join(folder, file_of(row, base, named[0])), "") if named else (None, "")
        except Unusable as problem:
            return named[0], str(problem)

    def _rows(self, folder: str) -> Iterator[Entry]:
        """The pictures that the metadata of a folder names; a bad row is an entry too."""
        file = os.path.join(folder, METADATA)
        base = os.path.realpath(os.path.join(self._root, folder))
        with open_rows(os.path.join(self._root, file), None) as source:
            for number, row in enumerate(source.rows, 1):
                here = f"{file}, row {number}"
                try:
                    name = os.path.join(folder, file_of(row, base))
                except Unusable as problem:
                    yield Entry(here, problem=str(problem))
                    continue
                control, why = self._control_in(row, folder, base)
                try:
                    yield Entry(name, caption_in(row, self._field), "", control, why)
                except Unusable as problem:
                    yield Entry(name, problem=str(problem), control=control)


def file_of(row: dict | str, base: str, field: str = "file_name") -> str:
    """The path that a row of metadata names, from `base` (a real path) on; Unusable if it leads away."""
    if isinstance(row, str):
        raise Unusable(row)
    name = row.get(field)
    if not isinstance(name, str) or not name.strip():
        raise Unusable(f"no {field}")
    if why := astray(name, base):
        raise Unusable(f"{field} {why}")
    return os.path.normpath(name)


def list_files(root: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Paths below a folder from it on, sorted and without the hidden; and folders that cannot be read.

    Folders that are links are not followed, as they may lead around in a circle: they are told.
    """
    names, problems = [], []

    def note(error: OSError) -> None:
        problems.append((os.path.relpath(error.filename, root), error.strerror or str(error)))

    for folder, folders, files in os.walk(root, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                why = "a link to a folder is not followed: give that folder to data.paths, too"
                problems.append((os.path.normpath(os.path.join(below, name)), why))
        names += [os.path.normpath(os.path.join(below, f)) for f in files if not f.startswith(".")]
    return sorted(names), problems
