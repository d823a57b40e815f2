"""The output folder of a job: what lies where, and when something counts as done.

job.json                    which job this is
shards/000012.tar, ...      pictures (engine/jobs/formats.py)
manifests/000012.json       what is in the shard. Written last and once: the shard is done when it is there
failures/000012.jsonl       rows and pictures of the shard that could not be drawn, and why
claims/000012.0             who is at work on it (engine/jobs/claims.py)
failures.jsonl, index.jsonl all of the above in one file, made at the end and by --merge
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from engine.jobs.plan import Job, difference, shard_name
from engine.jobs.store import Store
from engine.types import UserError


def read_job(store: Store) -> dict[str, Any]:
    """job.json; UserError where there is none, or a damaged one."""
    try:
        job = json.loads(store.read("job.json"))
        _ = job["fingerprint"], job["shards"], job["pictures"], job["groups"], job["row_count"]
        return job
    except FileNotFoundError:
        raise UserError(f"{store.url} holds no job; write the folder of one (with a job.json)") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{store.url}: job.json is damaged; begin again in another folder") from None


def seed_of(store: Store) -> int | None:
    """The seed of the job that was begun in the folder, if one was."""
    try:
        return json.loads(store.read("job.json"))["fingerprint"]["seed"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{store.url}: job.json is damaged; begin again in another folder") from None


def enter(store: Store, job: Job, any_seed: bool = False) -> Job:
    """Writes job.json, or finds that it is there and tells of this very job.

    Args:
      any_seed: take the seed of the job that is there, as when several workers begin at once without one.

    Raises:
      UserError: the folder holds another job; says how it differs.
    """
    mine = json.dumps(job.describe(), indent=1)
    if seed_of(store) is None and done(store):
        raise UserError(
            f"{store.url} has shards, and no job.json that says of which job they are: bring it back, or "
            "choose another folder with --out"
        )
    if store.create("job.json", mine.encode()):
        return job
    theirs = read_job(store)["fingerprint"]
    if any_seed:
        job = dataclasses.replace(job, config=dataclasses.replace(job.config, seed=theirs.get("seed")))
    differs = difference(json.loads(json.dumps(job.describe()))["fingerprint"], theirs)
    if differs:
        raise UserError(f"{store.url} holds another job ({differs}); choose another folder with --out")
    return job


def done(store: Store) -> set[str]:
    """Names of the shards that are done."""
    return {name.removesuffix(".json") for name in store.names("manifests") if name.endswith(".json")}


def newest(store: Store) -> list[str]:
    """The same in the order in which they were done, the last one first."""
    times = store.times("manifests")
    names = [name for name in times if name.endswith(".json")]
    names.sort(key=lambda name: (times[name], name), reverse=True)
    return [name.removesuffix(".json") for name in names]


def is_done(store: Store, name: str) -> bool:
    """Whether this one shard is done: sure, where a listing may be late."""
    try:
        store.read(f"manifests/{name}.json")
    except FileNotFoundError:
        return False
    return True


def commit(
    store: Store,
    name: str,
    data: pathlib.Path | None,
    manifest: Mapping[str, Any],
    failures: list[dict[str, Any]],
) -> bool:
    """Puts a finished shard in its place, the manifest last.

    Args:
      data: the local file or folder with the pictures; None where there are none.

    Returns:
      False where another worker had been quicker.
    """
    if is_done(store, name):
        return False
    if data is not None:
        store.publish(data, f"shards/{data.name}")
    if failures:
        store.write(f"failures/{name}.jsonl", _lines(failures))
    else:  # of an attempt before, whose manifest was removed or never came
        store.delete(f"failures/{name}.jsonl")
    # One line a picture, so that people and line tools can read it.
    head = json.dumps({key: value for key, value in manifest.items() if key != "pictures"})
    pictures = ",\n".join(json.dumps(picture) for picture in manifest["pictures"])
    text = f'{head[:-1]}, "pictures": [\n{pictures}\n]}}\n'
    return store.create(f"manifests/{name}.json", text.encode())


def read_manifest(store: Store, name: str) -> dict[str, Any]:
    """A manifest; ValueError where it is damaged."""
    try:
        manifest = json.loads(store.read(f"manifests/{name}.json"))
        _ = [picture["number"] for picture in manifest["pictures"]], manifest["failures"]
        return manifest
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"manifests/{name}.json is damaged") from None


def read_failures(store: Store) -> Iterator[dict[str, Any]]:
    """What failed so far, in the order of the shards."""
    for file in store.names("failures"):
        yield from read_failures_of(store, file)


def read_failures_of(store: Store, file: str) -> list[dict[str, Any]]:
    """What failed in one shard. UserError where the list is damaged."""
    try:
        failures = [json.loads(line) for line in store.read(f"failures/{file}").splitlines()]
        _ = [(failure["row"], failure["id"], failure["reason"]) for failure in failures]
        return failures
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{store.url}/failures/{file} is damaged; remove it and manifests/{file.partition('.')[0]}.json, "
            "and the same command draws that shard again"
        ) from None


def write_failures(store: Store) -> int:
    """Gathers failures.jsonl, which is there only if there are any; returns how many."""
    failures = list(read_failures(store))
    if failures:
        store.write("failures.jsonl", _lines(failures))
    else:
        store.delete("failures.jsonl")
    return len(failures)


def pictures_of(job: Mapping[str, Any], shard: int) -> int:
    """How many pictures the shard holds, or rows that cannot be drawn."""
    group = next(group for group in reversed(job["groups"]) if group["first_shard"] <= shard)
    size = job["fingerprint"]["shard_size"]
    return min(size, group["count"] - (shard - group["first_shard"]) * size)


def names(job: Mapping[str, Any]) -> list[str]:
    """Of all shards of the job."""
    return [shard_name(number) for number in range(job["shards"])]


def _lines(objects: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in objects)
