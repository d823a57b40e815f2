"""How fast a job is, by the manifests of its workers."""

import json
import os

import pytest

from engine.jobs import folder, report
from engine.jobs.store import open_store

PICTURES, SECONDS = 10, 100.0  # of a shard
NOW = 1_000_000.0


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def begin(store, shards):
    group = {"first_shard": 0, "count": shards * PICTURES, "rows": shards * PICTURES, "settings": {}}
    job = {"fingerprint": {"shard_size": PICTURES}, "shards": shards, "groups": [group]}
    store.write("job.json", json.dumps({**job, "pictures": 1, "row_count": 1}).encode())


def finish(store, tmp_path, shard, worker, ended, seconds=SECONDS):
    """A shard whose manifest was written when it ended."""
    pictures = [{"number": shard * PICTURES + i} for i in range(PICTURES)]
    times = {"began": ended - seconds, "ended": ended}
    manifest = {"worker": worker, "failures": 0, "pictures": pictures, **times}
    store.write(f"manifests/{shard:06d}.json", json.dumps(manifest).encode())
    os.utime(tmp_path / "manifests" / f"{shard:06d}.json", (ended, ended))


@pytest.mark.parametrize("workers", [1, 64, 150])
def test_all_workers_that_are_at_work_count(store, tmp_path, workers):
    """However many; and none of those that have stopped."""
    begin(store, 1000)
    for shard in range(2 * workers):
        finish(store, tmp_path, shard, f"w{shard % workers}", NOW - 250 + shard * SECONDS / workers)
    for shard in range(2 * workers, 2 * workers + 70):
        finish(store, tmp_path, shard, f"gone{shard}", NOW - 10 * SECONDS)
    status = report.status(store, NOW)
    assert status.rate == pytest.approx(workers * PICTURES / SECONDS)
    left = 1000 * PICTURES - status.pictures_done
    assert status.seconds_left == pytest.approx(left / status.rate)


def test_workers_with_a_part_of_their_own_may_be_far_behind_others(store, tmp_path):
    """Numbers of shards are no order in time: here one process of two is 90 of its shards ahead."""
    begin(store, 1000)
    for i in range(100):
        finish(store, tmp_path, 2 * i, "quick", NOW - 100 + i, seconds=1.0)
    for i in range(5):
        finish(store, tmp_path, 2 * i + 1, "slow", NOW - 100 + 20 * i, seconds=20.0)
    assert report.status(store, NOW).rate == pytest.approx(PICTURES / 1 + PICTURES / 20)


def test_a_long_job_is_not_read_to_its_beginning(store, tmp_path, monkeypatch):
    begin(store, 1000)
    for shard in range(1000):
        finish(store, tmp_path, shard, f"w{shard % 2}", NOW - (1000 - shard) * SECONDS / 2)
    read, sound = [], folder.read_manifest
    monkeypatch.setattr(folder, "read_manifest", lambda *args: read.append(args) or sound(*args))
    assert report.status(store, NOW).rate == pytest.approx(2 * PICTURES / SECONDS)
    assert len(read) <= 2 * report.RECENT
