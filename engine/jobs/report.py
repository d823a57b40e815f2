"""What a job's folder holds: how far it is, whether all is sound, and one index of it all.

Nothing here needs the model, the prompts or a device.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engine.jobs import folder, formats
from engine.jobs.store import Store
from engine.types import UserError

RECENT = 64  # manifests that are read at a time, to see how fast the job is
FORGOTTEN = 3  # a worker that has finished nothing for so many times its usual time has stopped


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a job is."""

    shards: int
    shards_done: int
    pictures: int  # of the whole job, rows that cannot be drawn included
    pictures_done: int
    failures: int
    rate: float  # images/s of all workers together, lately; 0 where none is at work
    claimed: int  # shards that workers hold

    @property
    def seconds_left(self) -> float | None:
        return (self.pictures - self.pictures_done) / self.rate if self.rate else None


def status(store: Store, now: float | None = None) -> Status:
    """Reads how far the job is.

    Args:
      now: seconds since 1970; None: the clock's.
    """
    job, done = folder.read_job(store), folder.newest(store)
    sizes = {name: folder.pictures_of(job, int(name)) for name in done}
    return Status(
        shards=job["shards"],
        shards_done=len(done),
        pictures=sum(group["count"] for group in job["groups"]),
        pictures_done=sum(sizes.values()),
        failures=sum(1 for _ in folder.read_failures(store)),
        rate=_rate(store, done, time.time() if now is None else now),
        claimed=len({name.partition(".")[0] for name in store.names("claims")} - set(done)),
    )


def _rate(store: Store, done: list[str], now: float) -> float:
    """Images a second: the sum over workers that are still at it of how fast each was lately.

    Args:
      done: shards, the newest first. Of them so many manifests are read as tell of workers that are at work:
        some two for each of those, however long the job.
    """
    by_worker = defaultdict(list)
    for first in range(0, len(done), RECENT):
        known = {worker for worker, shards in by_worker.items() if _rate_of(shards, now)}
        for name in done[first : first + RECENT]:
            manifest = _sound_manifest(store, name)
            by_worker[manifest["worker"]].append(manifest)
        if known == {worker for worker, shards in by_worker.items() if _rate_of(shards, now)}:
            break
    return sum(_rate_of(shards, now) for shards in by_worker.values())


def _rate_of(shards: list[dict[str, Any]], now: float) -> float:
    """Images a second of the worker of these shards; 0 where it has stopped."""
    seconds = sum(shard["ended"] - shard["began"] for shard in shards)
    newest = max(shard["ended"] for shard in shards)
    if seconds <= 0 or now - newest >= FORGOTTEN * max(seconds / len(shards), 10):
        return 0.0
    return sum(len(shard["pictures"]) for shard in shards) / seconds


@dataclasses.dataclass
class Found:
    """What `verify` saw."""

    pictures: int = 0
    failures: int = 0
    problems: int = 0
    open_shards: int = 0


def verify(store: Store) -> Iterator[tuple[str, list[str], Found]]:
    """Reads every picture again: hashes, counts, and whether each picture of the job is there just once.

    Yields:
      After each shard, and once at the end (with the name ''): its name, what is wrong there in words, and
      the sum so far.
    """
    job = folder.read_job(store)
    images = job["fingerprint"]["num_images"]
    times = np.zeros(job["row_count"] * images, np.uint8)
    found, done = Found(), folder.done(store)
    failures = defaultdict(list)
    for file in store.names("failures"):
        failures[file.removesuffix(".jsonl")] = folder.read_failures_of(store, file)
    for name in folder.names(job):
        if name not in done:
            found.open_shards += 1
            continue
        problems = _verify_shard(store, job, name, failures[name], times, found)
        found.problems += len(problems)
        yield name, problems, found
    problems = [f"shard {name} is not of this job" for name in sorted(done - set(folder.names(job)))]
    problems += [
        f"picture {number} is there {times[number]} times" for number in np.flatnonzero(times > 1).tolist()
    ]
    if not found.open_shards:
        missing = np.flatnonzero(times == 0).tolist()
        problems += [f"picture {number} is in no shard, though all are done" for number in missing]
    found.problems += len(problems)
    yield "", problems, found


def _verify_shard(
    store: Store,
    job: Mapping[str, Any],
    name: str,
    failures: list[dict[str, Any]],
    times: np.ndarray,
    found: Found,
) -> list[str]:
    images = job["fingerprint"]["num_images"]
    try:
        manifest = folder.read_manifest(store, name)
    except ValueError as error:
        return [str(error)]
    pictures, problems = manifest["pictures"], []
    if any(picture["number"] >= len(times) for picture in pictures):
        return [f"{name}: its pictures are of another job"]
    expected = folder.pictures_of(job, int(name))
    if manifest["failures"] != len(failures):
        problems.append(
            f"{name}: the manifest tells of {manifest['failures']} failures, {len(failures)} are there"
        )
    if len(pictures) + len(failures) != expected:
        problems.append(
            f"{name}: {len(pictures)} pictures and {len(failures)} failures; {expected} were planned"
        )
    for failure in failures:
        first = failure.get("number", failure["row"] * images)
        times[first : first + (1 if "number" in failure else images)] += 1
    for picture in pictures:
        times[picture["number"]] += 1
    found.pictures += len(pictures)
    found.failures += len(failures)
    return problems + _verify_data(store, manifest["format"], name, pictures)


def _verify_data(store: Store, format: str, name: str, pictures: list[dict[str, Any]]) -> list[str]:
    problems, count = [], 0
    try:
        for png in formats.read_pngs(store, format, name) if pictures else ():
            if count < len(pictures) and hashlib.sha256(png).hexdigest() != pictures[count]["sha256"]:
                problems.append(
                    f"{name}: picture {pictures[count]['number']} is damaged: its sha256 is another"
                )
            count += 1
    except FileNotFoundError:
        return [*problems, f"{name}: its pictures are gone"]
    except ValueError as error:
        return [*problems, f"{name}: {error}"]
    if count != len(pictures):
        problems.append(f"{name}: {count} pictures are there; the manifest has {len(pictures)}")
    return problems


def merge(store: Store) -> int:
    """Writes index.jsonl, a line a picture, in the order of the shards; returns how many.

    Raises:
      UserError: a manifest is damaged, or the folder cannot be written.
    """
    path, count = store.patiently(lambda: _write_index(store))
    store.publish(path, "index.jsonl")
    folder.write_failures(store)
    return count


def _write_index(store: Store) -> tuple[pathlib.Path, int]:
    path, count = store.spool() / "index.jsonl", 0
    with open(path, "w", encoding="utf-8") as file:
        for name in sorted(folder.done(store)):
            manifest = _sound_manifest(store, name)
            where = formats.path_of(manifest["format"], name)
            for place, picture in enumerate(manifest["pictures"]):
                member = formats.member_of(manifest["format"], picture, place)
                file.write(json.dumps({"file": where, "member": member, **picture}) + "\n")
                count += 1
    return path, count


def _sound_manifest(store: Store, name: str) -> dict[str, Any]:
    try:
        return folder.read_manifest(store, name)
    except ValueError as error:
        raise UserError(
            f"{store.url}/{error}; remove it, and the same command draws that shard again (--verify tells "
            "what else is wrong)"
        ) from None
