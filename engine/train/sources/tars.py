"""WebDataset's tars: KEY.png (or .jpg, .webp) with its caption in KEY.txt or KEY.json, and in
KEY.control.png what a ControlNet is to be shown of it.

The headers are read once; a picture is then read from its place, so that any order is as quick. Tars that
are compressed as a whole (.tar.gz) have no such places.
"""

import functools
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engine.train.sources.item import (
    BESIDE,
    PICTURES,
    Item,
    Unusable,
    caption_in_json,
    caption_of,
    open_part,
    read_text,
)

Place = tuple[int, int]  # of a member in its tar: where it begins, and its size


class Entry(NamedTuple):
    tar: str
    name: str
    picture: Place = (0, 0)
    captions: tuple[tuple[str, Place], ...] = ()  # suffix and place of each file beside it
    problem: str = ""
    control: Place | None = None


class Tars:
    """The pictures of several tars, one tar after the other."""

    def __init__(self, paths: Sequence[str], field: str = ""):
        self._field = field
        self._entries = [entry for path in paths for entry in _index(path)]

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, i: int) -> str:
        entry = self._entries[i]
        return os.path.join(entry.tar, entry.name) if entry.name else entry.tar

    def read(self, i: int) -> Item:
        entry = self._entries[i]
        if entry.problem:
            raise Unusable(entry.problem)
        caption = self._caption(entry.tar, dict(entry.captions))
        control = functools.partial(open_part, entry.tar, *entry.control) if entry.control else None
        return Item(open_part(entry.tar, *entry.picture), caption, control)

    def _caption(self, tar: str, beside: dict[str, Place]) -> str | None:
        for suffix in ("json", "txt") if self._field else ("txt", "json"):
            if suffix in beside:
                start, size = beside[suffix]
                data = read_text(open_part(tar, start, size)) if size else b""
                return caption_of(data) if suffix == "txt" else caption_in_json(data, self._field)
        return None


def _index(path: str) -> Iterator[Entry]:
    """The pictures of a tar; last, where it is damaged, an entry that says so."""
    members: dict[str, dict[str, tuple[str, Place]]] = {}  # key -> suffix -> name and place
    problem = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg():
                    key, suffix = split_key(member.name)
                    place = member.offset_data, member.size
                    members.setdefault(key, {})[suffix] = member.name, place
                tar.members = []  # it would keep them all
            if not _ends_well(path, tar.offset):
                problem = f"damaged or cut off at byte {tar.offset}: what follows is lost"
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        problem = f"damaged or no tar ({str(error)[:80]}): what follows is lost"
    for files in members.values():
        captions = tuple((suffix, files[suffix][1]) for suffix in ("txt", "json") if suffix in files)
        beside = (f"{BESIDE}{suffix}"[1:] for suffix in PICTURES)
        control = next((files[suffix][1] for suffix in beside if suffix in files), None)
        alone = not any(f".{suffix}" in PICTURES for suffix in files)  # else it goes with that picture
        for suffix, (name, place) in files.items():
            if f".{suffix}" in PICTURES:
                yield Entry(path, name, place, captions, control=control)
            elif alone and suffix.endswith(PICTURES) and not f".{suffix}".startswith(BESIDE):
                yield Entry(path, name, problem=f"a dot in its name: in a tar it is the {suffix} of another")
    if problem:
        yield Entry(path, "", problem=problem)


def split_key(name: str) -> tuple[str, str]:
    """a/b.seg.png -> a/b and seg.png, in small letters, as WebDataset does."""
    folder, _, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return f"{folder}/{key}", suffix.lower()


def _ends_well(path: str, offset: int) -> bool:
    """Whether the end is marked: to tarfile, a damaged header is an end as well."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    return len(block) == tarfile.BLOCKSIZE and not any(block)
