"""Disks that fail: tried again while patience lasts, then one line, and nothing half-written."""

import errno
import os
import shutil
import subprocess
import time

import pytest

from engine.jobs import store as stores
from engine.jobs.store import open_store
from tests.jobs.failing import CALLS, PATIENCE, QUICK, made, refused, takes
from tests.test_finish_disks import largest_file, no_rights_in


@pytest.fixture
def disk(tmp_path, told):
    return open_store(str(tmp_path / "out"), PATIENCE, told.append)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".scratch" not in path.parts)


def full_disk(monkeypatch, failures):
    """The next so many writes find no space."""
    fsync, left = os.fsync, [failures]

    def full(handle):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)


WRITES = {name: CALLS[name] for name in ("write", "create", "publish")}


@pytest.mark.parametrize("call", WRITES.values(), ids=WRITES)
def test_a_disk_that_is_full_for_a_while(told, tmp_path, call, monkeypatch):
    out = tmp_path / "out"
    full_disk(monkeypatch, 2)
    call(open_store(str(out), 60.0, told.append))
    assert told == [f"{out}: No space left on device; trying again for up to 60 s"]
    assert len(tree(out)) in (1, 5)


@pytest.mark.parametrize("call", WRITES.values(), ids=WRITES)
def test_a_disk_that_stays_full(disk, told, tmp_path, call, monkeypatch):
    disk.write("a", b"old")
    full_disk(monkeypatch, 10_000)
    with (
        takes(PATIENCE, PATIENCE),
        refused("No space left on device; free some space, or choose another folder"),
    ):
        call(disk)
    assert set(tree(tmp_path / "out")) <= {"a", "shards"} and disk.read("a") == b"old"
    assert len(told) == 1
    assert [path for path in disk.spool().iterdir() if path.is_file()] == [disk.spool() / ".lock"]


def test_space_is_freed_while_it_waits(tmp_path, told):
    """On a real small disk, where there is the right to make one."""
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(out)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        (out / "ballast").write_bytes(bytes(2**17))
        store = open_store(
            str(out), 60, told.append, pause=lambda _: (out / "ballast").unlink(missing_ok=True)
        )
        store.write("a", bytes(3 * 2**16))
        assert store.read("a") == bytes(3 * 2**16)
        assert told == [f"{out}: No space left on device; trying again for up to 60 s"]
        path = store.spool() / "000000.tar"
        told.clear()
        with refused("No space left on device"):
            impatient = open_store(str(out), PATIENCE)
            impatient.patiently(lambda: path.write_bytes(bytes(2**18)))
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


def test_a_write_that_fails_half_way(disk, tmp_path):
    disk.write("a", b"old")
    with largest_file(1000), refused("a: cannot be written: File too large"):
        disk.write("a", bytes(10_000))
    assert disk.read("a") == b"old"
    assert tree(tmp_path / "out") == ["a"]
    assert list(disk.spool().iterdir()) == [disk.spool() / ".lock"]


def test_a_folder_without_rights(tmp_path, told):
    with no_rights_in(tmp_path):
        for name in (".", "below"):
            with takes(0, QUICK), refused(r"Permission denied; choose a folder .* --out"):
                open_store(str(tmp_path / name), 60, told.append)
    assert told == []


def test_rights_that_are_lost(disk, tmp_path):
    disk.write("claims/a", b"old")
    with no_rights_in(tmp_path / "out" / "claims"), refused("claims/b: cannot be written: Permission denied"):
        disk.write("claims/b", b"x")
    assert tree(tmp_path / "out") == ["claims", "claims/a"]


def test_a_path_that_is_a_file(tmp_path, told):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with takes(0, QUICK), refused("something else has that name; choose another folder with --out"):
            open_store(str(tmp_path / name), 60, told.append)
        with takes(0, QUICK), refused("cannot be read: Not a directory"):
            open_store(str(tmp_path / name), 60, told.append, writable=False)
    assert told == []


def test_something_else_has_the_name_of_a_file(disk, tmp_path):
    (tmp_path / "out" / "job.json" / "full").mkdir(parents=True)
    with refused("something else has that name"):
        disk.write("job.json", b"x")
    (tmp_path / "out" / "shards").touch()
    with refused("something else has that name"):
        disk.publish(made(disk), "shards/000000")


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(source, target, **_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with takes(0, QUICK), refused("its file system has no hard links, .*; choose another folder"):
        open_store(str(tmp_path / "out"))
    assert tree(tmp_path / "out") == []


def mount_point(out):
    """The disk goes: what is left is an empty folder."""
    os.rename(out, out.with_name("away"))
    out.mkdir()


def back(out):
    out.rmdir()
    os.rename(out.with_name("away"), out)


EVERY = CALLS | {
    "spool": lambda store: store.spool(),
    "patiently": lambda store: store.patiently(store.spool),
}


@pytest.mark.parametrize("go", [mount_point, lambda out: os.rename(out, out.with_name("away"))])
@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"delete"}))
def test_a_folder_that_goes_is_not_made_anew(disk, tmp_path, told, name, go):
    out = tmp_path / "out"
    disk.write("there", b"x")
    made(disk)
    go(out)
    with (
        takes(PATIENCE, PATIENCE),
        refused("the folder has gone, or another one is in its place; .* goes on"),
    ):
        EVERY[name](disk) if name != "publish" else disk.publish(out / "any", "shards/000000")
    assert not out.exists() or tree(out) == []
    assert len(told) >= 1


def test_a_folder_that_comes_back(tmp_path, told):
    out = tmp_path / "out"
    went = []

    def pause(_):
        if went:
            back(out)
            went.clear()

    store = open_store(str(out), 60, told.append, pause=pause)
    store.write("there", b"x")
    folder = made(store)
    for name, call in EVERY.items():
        mount_point(out)
        went.append(name)
        told.clear()
        if name == "publish":
            store.publish(folder, "shards/000000")
        elif name == "delete":
            back(out)
        else:
            call(store)
        assert name == "delete" or len(told) == 1, name
    assert store.names("") == ["a", "new", "shards", "there"]
    assert store.names("shards/000000") == ["a", "b", "c"]


def test_a_disk_that_is_mounted_again_is_the_same(tmp_path, told):
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir(), out.mkdir()
    mount = ["mount", "--bind", str(real), str(out)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    mounted = True
    try:
        store = open_store(str(out), 60, told.append, pause=lambda _: subprocess.run(mount, check=True))
        subprocess.run(["umount", "-l", str(out)], check=True)
        mounted = False
        store.write("a", b"x")
        mounted = True
        assert (real / "a").read_bytes() == b"x" and len(told) == 1
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(out)], check=True)
    assert list(out.iterdir()) == []


# ---- patience


def test_the_last_try_comes_when_patience_ends(tmp_path, monkeypatch):
    """And no pause is longer than what is left of it."""
    now, tries, pauses = [0.0], [], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pause(seconds):
        pauses.append(seconds)
        now[0] += seconds

    store = open_store(str(tmp_path), 100, pause=pause)

    def attempt():
        tries.append(now[0])
        now[0] += 0.001
        raise OSError("no")

    with refused("no"):
        store.patiently(attempt)
    assert tries[0] == 0 and 99.9 < tries[-1] <= 100.1
    assert len(tries) > 10 and max(pauses) <= stores.LONGEST_WAIT


def test_ctrl_c_while_it_waits(tmp_path):
    def pause(_):
        raise KeyboardInterrupt

    store = open_store(str(tmp_path / "out"), 60, pause=pause)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        store.write("a", b"x")
    assert not (tmp_path / "out").exists()


def test_mistakes_in_programs_are_not_tried_again(disk, told):
    with pytest.raises(ZeroDivisionError):
        disk.patiently(lambda: 1 // 0)
    assert told == []


def test_heartbeats_do_not_wait(disk, monkeypatch):
    disk.write("claims/a.0", b"old")
    full_disk(monkeypatch, 1)
    with takes(0, 0), pytest.raises(OSError, match="No space left"):
        disk.write_once("claims/a.0", b"x")
    disk.write_once("claims/a.0", b"x")
    assert disk.read("claims/a.0") == b"x"
