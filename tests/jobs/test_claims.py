"""Leases: one owner at a time, taken over from the dead, kept by the living."""

import json
import subprocess
import sys
import threading
import time

import pytest

from engine.jobs.claims import Claims
from engine.jobs.store import open_store

LONG, SHORT = 3600.0, 0.4  # seconds


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "out"))


def foreign(claim: bytes) -> bytes:
    """The claim as a worker on another machine would have written it."""
    return json.dumps(json.loads(claim) | {"place": "another machine"}).encode()


def test_a_shard_has_one_owner_of_many_who_want_it(store):
    workers = [Claims(store, LONG) for _ in range(8)]
    start, took = threading.Barrier(8), []

    def want(worker):
        start.wait()
        took.extend(shard for shard in map(str, range(40)) if worker.take(shard, None))

    threads = [threading.Thread(target=want, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(took, key=int) == list(map(str, range(40)))


def test_what_is_given_back_can_be_had(store):
    first, second = Claims(store, LONG), Claims(store, LONG)
    assert first.take_first(["a", "b"]) == "a"
    assert first.has("a") and first.holds("a")
    assert second.take_first(["a", "b"]) == "b"
    assert second.take_first(["a", "b"]) is None
    first.release("a")
    assert not first.has("a") and not first.holds("a")
    assert second.take_first(["a", "b"]) == "a"


def test_a_heartbeat_keeps_a_claim_and_silence_loses_it(store, tmp_path):
    claim = tmp_path / "out" / "claims" / "a.0"
    second = Claims(store, SHORT)
    with Claims(store, SHORT) as first:
        assert first.take("a", None)
        deadline = time.monotonic() + 4 * SHORT
        while time.monotonic() < deadline:
            assert second.take_first(["a"]) is None
            time.sleep(SHORT / 10)
        assert first.holds("a")
        last = foreign(claim.read_bytes())
    assert not claim.exists()  # given back at the end

    claim.write_bytes(last)  # as if its owner, on another machine, had died
    assert second.take_first(["a"]) is None, "it has not been watched for a lease"
    while second.take_first(["a"]) is None:
        time.sleep(SHORT / 10)
    assert second.holds("a")
    assert (tmp_path / "out" / "claims" / "a.1").exists()
    second.release("a")
    assert second.listing() == {}, "the dead worker's claim goes too"


def test_who_slept_through_its_lease_learns_of_it(store, tmp_path):
    sleeper, other = Claims(store, SHORT), Claims(store, SHORT)
    assert sleeper.take("a", None)  # its heart never beats: the context is not open
    claim = tmp_path / "out" / "claims" / "a.0"
    claim.write_bytes(foreign(claim.read_bytes()))
    while other.take_first(["a"]) is None:
        time.sleep(SHORT / 10)
    assert other.holds("a") and not sleeper.holds("a")
    sleeper.release("a")
    assert other.holds("a"), "giving back what was lost takes nothing from the new owner"


def test_of_a_process_that_died_here_nobody_waits_for_the_lease(store):
    program = (
        "import sys; from engine.jobs.claims import Claims; from engine.jobs.store import open_store\n"
        "print(Claims(open_store(sys.argv[1]), 3600.0).take('a', None), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, store.url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    told = []
    other = Claims(store, LONG, told.append)
    assert other.take_first(["a"]) is None
    process.kill()
    process.wait()
    assert other.take_first(["a"]) == "a"
    assert told == ["shard a is taken over from a worker that is gone"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"place": 1}', b"\xff"])
def test_a_damaged_claim_is_waited_for_too(store, tmp_path, data):
    worker = Claims(store, SHORT)
    assert store.create("claims/a.0", data)
    assert worker.take_first(["a"]) is None
    time.sleep(2 * SHORT)
    assert worker.take_first(["a"]) == "a"
