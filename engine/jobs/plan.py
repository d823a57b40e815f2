"""What a job will make, before anything is drawn: rows into groups, groups into shards.

A job is a pure function from row and number to picture, so every worker finds the same plan by itself. Rows
that share weights (LoRAs of their own, or none) and a compiled program (size, steps, sampler, guidance or
none; a picture to change, a mask, the part of the steps that is taken; pictures for ControlNets and
IP-Adapters; how many parts words make) form a group; the pictures of a group, in the order of the file, are
cut into shards of one size. Rows that cannot be drawn form a last group, whose shards hold no pictures but
their reasons.

Memory: 12 bytes a row. The rows themselves stay on the disk (engine/text/rows.py), and so do pictures that
they name (engine/jobs/given.py).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

import engine
from engine.config import OF_THE_WAY, JobConfig
from engine.jobs.settling import LORA, Program, Settle, first_index, value_or
from engine.requests import Request, Settings
from engine.text.rows import Row, Rows

# Options that say which pictures a job makes. Where and how fast it makes them is no part of it.
FINGERPRINT = (
    *("negative_prompt", "num_images", "seed", "first_index", "sampler", "steps", "guidance_scale"),
    *("height", "width", "dtype", "upscale", "format", "shard_size"),
)
# The same, where they are given
ADDED = (
    *("prompt_weights", "long_prompts", "clip_skip", "tile", "quantize", "control_kind"),
    *("control_mode", "ip_adapter_layers", *OF_THE_WAY),
)
CHANGING = ("strength", "image_guidance_scale")  # the same, where there are pictures to change

ROWS_AT_ONCE = 512  # whose pictures are looked at together,
LOOKERS = 8  # by so many threads


class Wanted(NamedTuple):
    """A picture of the plan."""

    number: int  # row number x num_images + which of the row's pictures
    row: Row
    request: Request

    @property
    def address(self) -> dict[str, Any]:
        """Which picture it is, for manifests and lists of failures."""
        found = {"number": self.number, "row": self.row.number, "id": self.row.id}
        return found | {"seed": self.request.seed, "index": self.request.index}


class Refused(NamedTuple):
    """A row that cannot be drawn, and why."""

    row: int
    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share one compiled program; with None, rows that cannot be drawn."""

    program: Program | None
    rows: np.ndarray  # their numbers, int64
    count: int  # of its pictures, or of its refused rows
    first_shard: int

    @property
    def settings(self) -> Settings | None:
        return self.program and self.program.settings


class Shard(NamedTuple):
    """Pictures `start` to `stop` of a group."""

    number: int
    group: Group
    start: int
    stop: int

    @property
    def name(self) -> str:
        return shard_name(self.number)


@dataclasses.dataclass(frozen=True)
class Job:
    """Rows, options and groups: all that says which pictures there will be."""

    config: JobConfig  # complete
    rows: Rows
    groups: tuple[Group, ...]
    digests: Mapping[str, str]  # of the model's files and all others, see engine.jobs.digests
    given: str = ""  # digest of the pictures beside the words, and of LoRAs of rows, if there are any
    pictured: bool = False  # whether there are pictures, or may have been

    @property
    def shards(self) -> int:
        last = self.groups[-1]
        return last.first_shard + shards_of(last.count, self.config.shard_size)

    @property
    def pictures(self) -> int:
        """Pictures that the job will make, if none fails."""
        return sum(group.count for group in self.groups if group.settings is not None)

    @property
    def programs(self) -> int:
        """How many are compiled."""
        return len({group.program.compiled for group in self.groups if group.program})

    def shard(self, number: int) -> Shard:
        """The shard of that number, from 0."""
        group = next(group for group in reversed(self.groups) if group.first_shard <= number)
        start = (number - group.first_shard) * self.config.shard_size
        return Shard(number, group, start, min(start + self.config.shard_size, group.count))

    def wanted(self, shard: Shard) -> Iterator[Wanted]:
        """The pictures of a shard that can be drawn."""
        images = self.config.num_images
        for picture in range(shard.start, shard.stop):
            row, image = divmod(picture, images)
            row = self.rows[int(shard.group.rows[row])]
            yield Wanted(row.number * images + image, row, request(self.config, row, image))

    def refused(self, shard: Shard, settle: Settle) -> Iterator[Refused]:
        """The rows of a shard of the last group."""
        for number in shard.group.rows[shard.start : shard.stop]:
            row = self.rows[int(number)]
            why = settle(row)
            changed = "its picture was another when the job began; write the row into another job"
            yield Refused(row.number, row.id, why if isinstance(why, str) else changed)

    def describe(self) -> dict[str, Any]:
        """What job.json holds: the fingerprint, and the sizes that --status and --verify ask for."""
        groups = [
            {
                "first_shard": group.first_shard,
                "count": group.count,
                "rows": len(group.rows),
                "settings": group.program and _told(group.program),
            }
            for group in self.groups
        ]
        options = {name: getattr(self.config, name) for name in FINGERPRINT}
        version = {"version": engine.__version__, "rows": self.rows.digest, **self.digests}
        nothing = ("hires", "hires_strength", "hires_steps") if self.config.hires in (None, 1) else ()
        named = (name for name in ADDED if name not in nothing)
        version |= {name: value for name in named if (value := getattr(self.config, name))}
        if self.given:
            version |= {"given": self.given} | {name: getattr(self.config, name) for name in CHANGING}
        sizes = {"shards": self.shards, "pictures": self.pictures, "row_count": len(self.rows)}
        return {"fingerprint": version | options, **sizes, "groups": groups}


def shard_name(number: int) -> str:
    return f"{number:06d}"


def shards_of(count: int, size: int) -> int:
    """Shards that `count` pictures fill."""
    return -(-count // size)


def _told(program: Program) -> dict[str, Any]:
    """What is compiled in: all but the guidance scale and the batch."""
    settings = program.settings
    found = {name: getattr(settings, name) for name in ("steps", "sampler", "height", "width")}
    found["guided"] = settings.guidance_scale != 1
    if program.image:
        found |= {"image": True, "mask": program.mask, "intervals": settings.intervals}
    if program.control:
        found["control_image"] = True
    if program.prompted:
        found["image_prompt"] = True
    if program.lora is not None:
        found["lora"] = program.lora.told
    if program.length:
        found["parts"] = max(program.length)
    return found


def make_plan(
    config: JobConfig,
    rows: Rows,
    settle: Settle,
    digests: Mapping[str, str],
    progress: Callable[[int], None] = lambda rows: None,
) -> Job:
    """Sorts every row into its group.

    Args:
      config: complete: its seed is known.
      progress: called often, with how many rows have their place; what it raises stops the planning.

    Raises:
      UserError: trouble on the way to a picture, which may pass.
    """
    found: dict[Program | None, int] = {}
    group_of = np.empty(len(rows), np.int32)
    pictures, lora_order = hashlib.sha256(), {None: 0}
    some = pictured = False
    for row, program, mark in _judged(rows, settle, progress):
        key = None if isinstance(program, str) else program
        group_of[row] = found.setdefault(key, len(found))
        if mark:
            some, pictured = True, pictured or not mark.startswith(LORA)
            pictures.update(f"{row} {mark}\n".encode())
    members = {key: np.flatnonzero(group_of == number) for key, number in found.items()}
    counts = {key: len(rows) * (1 if key is None else config.num_images) for key, rows in members.items()}
    most: dict[Program, int] = {}  # pictures of a group: one program, of one batch size, serves all LoRAs
    for key, count in counts.items():
        if key is not None:
            lora_order.setdefault(key.lora, len(lora_order))
            most[key.compiled] = max(count, most.get(key.compiled, 0))

    def order(key: Program | None) -> tuple[bool, int, int]:
        """Those of a LoRA behind each other, so that it is loaded once; the job's own first."""
        return key is None, 0 if key is None else lora_order[key.lora], found[key]

    groups, first_shard = [], 0
    for key in sorted(found, key=order):
        count = counts[key]
        program = key and settle.fitted(key, most[key.compiled])
        groups.append(Group(program, members[key], count, first_shard))
        first_shard += shards_of(count, config.shard_size)
    return Job(config, rows, tuple(groups), digests, pictures.hexdigest() if some else "", pictured)


def _judged(
    rows: Rows, settle: Settle, progress: Callable[[int], None]
) -> Iterator[tuple[int, Program | str, str]]:
    with ThreadPoolExecutor(LOOKERS, "looks") as threads:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            progress(first)
            some = [rows[i] for i in range(first, min(first + ROWS_AT_ONCE, len(rows)))]
            sound = [row for row in some if isinstance(row, Row)]
            settle.pictures.look_ahead(sound, threads)
            settle.loras.look_ahead(sound, threads, functools.partial(progress, first))
            for row in some:
                yield row.number, *settle.judge(row)


def request(config: JobConfig, row: Row, image: int) -> Request:
    """Picture `image` of the row, as the pipeline takes it, but for the picture that it is to change."""
    return Request(
        row.prompt,
        value_or(row.negative_prompt, config.negative_prompt),
        value_or(row.seed, config.seed),
        first_index(config, row) + image * config.candidates,
        value_or(row.guidance_scale, config.guidance_scale),
        image_guidance_scale=value_or(row.image_guidance_scale, config.image_guidance_scale),
    )


OTHERS = {
    "rows": "other rows",
    "weights": "other weights",
    "given": "other pictures to change, or for networks to see, or other LoRAs of rows",
}


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """In words, how the job of a folder (`theirs`) differs from this one; None if it does not."""
    names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    said = [
        OTHERS[name] if name in OTHERS else f"{name} {theirs.get(name)!r} there and {mine.get(name)!r} here"
        for name in names
    ]
    return ", ".join(said) or None
