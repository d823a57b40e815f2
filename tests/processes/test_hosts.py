"""Hosts of one training do the same at each step: they stop together, and read the same checkpoint."""

import json
import re
import shutil

import pytest

from tests.processes.together import started
from tests.train.test_checkpoint import DAMAGES
from tests.train.tiny_run import steps_in

PROCESSES, DEVICES = 2, 2
OLD, NEW = 2, 4  # the checkpoints


def seen(work, *cases):
    """By each of two hosts; see one_host.py."""
    started("tests.processes.one_host", [f"--work={work}", "--cases", *cases], DEVICES, PROCESSES)
    return [json.loads((work / f"host-{i}.json").read_text()) for i in range(PROCESSES)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def trained(work):
    return seen(work, "lengths", "stops")


def test_a_signal_is_heard_where_hosts_have_met(trained):
    """JAX has a handler of its own for SIGTERM, which would keep it to itself."""
    assert all(host["met"]["heard"] for host in trained)


def test_no_step_waits_for_other_hosts_nor_compiles(trained):
    """Sixteen steps wait as often as four: at the beginning, and for the checkpoint at the end."""
    for host in trained:
        assert host["short"] == host["long"]
        assert host["long"]["waits"]["process_allgather"] and host["long"]["compiled"]["jit(step)"] == 1


@pytest.mark.parametrize("signalled", range(PROCESSES))
def test_a_signal_to_one_host_stops_all_at_the_same_step_and_they_go_on(trained, signalled):
    first, second = (host[f"signal-{signalled}"] for host in trained)
    assert first == second
    assert first["stopped"] == [True, False]
    stopped, ended = first["saved"]
    assert stopped < ended == 16


def largest(folder, item, host):
    """The file with the arrays that one host has written."""
    files = (folder / str(NEW) / item / f"ocdbt.process_{host}").rglob("d/*")
    return max(files, key=lambda file: file.stat().st_size)


def position(folder, step):
    return folder / str(step) / "position/metadata"


# Each host reads its own part of the arrays: what one cannot read, the other can.
DAMAGED = {
    "truncated, of the first": lambda folder: DAMAGES["truncated"](largest(folder, "params", 0)),
    "truncated, of the second": lambda folder: DAMAGES["truncated"](largest(folder, "opt_state", 1)),
    "one bit, of the first": lambda folder: DAMAGES["one bit"](largest(folder, "opt_state", 0)),
    "one bit, of the second": lambda folder: DAMAGES["one bit"](largest(folder, "params", 1)),
    "deleted, of the second": lambda folder: DAMAGES["deleted"](largest(folder, "ema_0.9", 1)),
    "position": lambda folder: DAMAGES["empty"](position(folder, NEW)),
}
REFUSED = {
    "all": lambda folder: [position(folder, step).unlink() for step in (OLD, NEW)],
    "other": lambda folder: None,
    "no room": DAMAGED["position"],
}


@pytest.fixture(scope="module")
def read(work, trained):
    for name, damage in (DAMAGED | REFUSED).items():
        damage(shutil.copytree(work / "whole/tiny", work / "damaged" / name))
    return seen(work, "reads")


@pytest.mark.parametrize("name", DAMAGED)
def test_what_one_host_cannot_read_none_takes(work, read, name):
    """It is told of once, has another name, and its step can be saved again."""
    folder = work / "damaged" / name
    first, second = (host[name] for host in read)
    assert first["step"] == second["step"] == OLD
    assert first["told"].startswith(f"{folder}/{NEW} cannot be read ") and first["told"].count("\n") == 1
    host = {"first": 0, "second": 1}.get(name.rpartition(", of the ")[2])
    # Where a bit still can be read, it shows in the sum over all hosts, and nobody knows whose it was.
    alike = host is None or "is not as it was written" in first["told"]
    assert alike != (f"by process {host} (" in first["told"])
    assert second["told"] == ""
    assert steps_in(folder) == [OLD, NEW] and (folder / f"broken-{NEW}").is_dir()


@pytest.mark.parametrize(
    "name, message",
    [
        ("all", "no checkpoint in .* can be read: restore one"),
        ("other", r"holds a run with another ema_0\.5, ema_0\.9: give another --workdir"),
        ("no room", "cannot be written: "),
        ("elsewhere", "process 1 does not see .*/of-host-1, which process 0 has made"),
    ],
)
def test_what_is_wrong_for_one_host_is_told_by_all(work, read, name, message):
    errors = {host[name]["error"] for host in read}
    if name == "elsewhere":
        errors = {error.replace("of-host-0", "of-host-1") for error in errors}
    assert len(errors) == 1 and re.search(message, errors.pop())
    if name in REFUSED:
        assert steps_in(work / "damaged" / name) == [OLD, NEW]
