"""Output folders that fail: tried again while patience lasts, then one line, and nothing half-written."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http import HTTPStatus

import pytest

from engine.errors import UserError
from engine.jobs import places
from engine.jobs import store as stores
from engine.jobs.store import open_store
from tests.test_finish_disks import largest_file, no_rights_in

PATIENCE, TIMEOUT = 0.3, 0.5  # seconds
BROKEN = "(It is broken|Internal Server Error|Service Unavailable)"  # HEAD is answered without a text
SLACK = 3.0  # seconds more than it should take, where the machine is busy
QUICK = 5.0  # seconds, much less than the patience of a minute


@pytest.fixture(autouse=True)
def spools_are_in_the_test_s_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def short_timeouts(monkeypatch):
    monkeypatch.setattr(stores, "SHORTEST_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(stores, "LONGEST_TIMEOUT", TIMEOUT)


@contextlib.contextmanager
def takes(least, most):
    """Seconds."""
    began = time.monotonic()
    yield
    assert least <= time.monotonic() - began < most + SLACK


@contextlib.contextmanager
def refused(message):
    """A UserError of one line, and nothing that Python adds to it."""
    with pytest.raises(UserError, match=message) as error:
        yield
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".scratch" not in path.parts)


@pytest.fixture
def told():
    return []


@pytest.fixture
def disk(tmp_path, told):
    return open_store(str(tmp_path / "out"), PATIENCE, told.append)


# ---- object stores

CALLS = {
    "write": lambda store: store.write("a", b"x"),
    "create": lambda store: store.create("new", b"x"),
    "read": lambda store: store.read("there"),
    "open": lambda store: store.open("there").close(),
    "names": lambda store: store.names(""),
    "delete": lambda store: store.delete("there"),
    "publish": lambda store: store.publish(made(store), "shards/000000"),
}


SOME_CALLS = {name: CALLS[name] for name in ("create", "open", "names", "publish")}


def made(store):
    folder = store.spool() / "000000"
    folder.mkdir(exist_ok=True)
    for name in "abc":
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_s3_that_fails_for_a_while(s3, told, call):
    store = open_store(s3.url, 60, told.append, pause=lambda _: None)
    store.write("there", b"x")
    for code in ("500 InternalError", "503 SlowDown"):
        told.clear()
        s3.server.fail(2, code)
        call(store)
        assert s3.server.faults_left == 0
        assert len(told) == 1
        assert re.fullmatch(f"{s3.url}: {BROKEN}; trying again for up to 60 s", told[0])


@pytest.mark.parametrize("call", SOME_CALLS.values(), ids=SOME_CALLS)
def test_s3_that_fails_for_ever(s3, told, call):
    store = open_store(s3.url, PATIENCE, told.append)
    store.write("there", b"x")
    s3.server.fail(10_000)
    with takes(PATIENCE, PATIENCE), refused(f"^{s3.url}.*: cannot be .*: {BROKEN}; .* goes on$"):
        call(store)
    assert len(told) == 1 and re.fullmatch(
        f"{s3.url}: {BROKEN}; trying again for up to {PATIENCE:g} s", told[0]
    )


def test_what_failed_for_ever_can_be_done_later(s3):
    store = open_store(s3.url, PATIENCE)
    folder = made(store)
    s3.server.fail(10_000, methods=("PUT",))
    with refused("cannot be written: It is broken"):
        store.publish(folder, "shards/000000")
    s3.server.heal()
    store.publish(folder, "shards/000000")
    assert store.names("shards/000000") == ["a", "b", "c"]


@pytest.mark.parametrize("call", SOME_CALLS.values(), ids=SOME_CALLS)
def test_s3_that_hangs(s3, told, call, short_timeouts):
    store = open_store(s3.url, 60, told.append)
    store.write("there", b"x")
    told.clear()
    s3.server.hang(1)
    call(store)
    assert s3.server.faults_left == 0
    assert told == [f"{s3.url}: no answer within {TIMEOUT:g} s; trying again for up to 60 s"]
    store._patience = PATIENCE
    s3.server.hang(10_000)
    with takes(PATIENCE, PATIENCE + 2 * TIMEOUT), refused("cannot be .*no answer within"):
        call(store)


def test_s3_that_takes_no_more_bytes(s3, told, monkeypatch, short_timeouts):
    """An upload that stalls half-way: the sockets are full, and no answer is due yet."""
    monkeypatch.setattr(places, "SLOWEST", 2**28)
    store = open_store(s3.url, 60, told.append)
    path = store.spool() / "000000.tar"
    path.write_bytes(bytes(2**25))
    s3.server.hang(10_000)
    store._patience = PATIENCE
    with takes(PATIENCE, PATIENCE + TIMEOUT), refused("000000.tar: cannot be written: no answer within"):
        store.publish(path, "shards/000000.tar")


def test_s3_that_loses_its_answers(s3):
    store = open_store(s3.url)
    store.write("other", b"theirs")
    for path, data, outcome in (("a", b"mine", True), ("other", b"mine", False)):
        s3.server.lose_answers(2, methods=("PUT",))  # a broken connection is mended once, without our help
        assert store.create(path, data) == outcome
        assert s3.server.faults_left == 0
    assert store.read("other") == b"theirs"
    s3.server.lose_answers(2)
    store.write("b", b"x")
    s3.server.lose_answers(2)
    assert store.read("b") == b"x"
    s3.server.lose_answers(2)
    store.delete("b")
    s3.server.lose_answers(2)
    assert store.names("") == ["a", "other"]


def test_s3_that_loses_the_rest_of_a_file(s3, monkeypatch):
    """A file of which a part arrived is not taken for the whole."""
    store = open_store(s3.url)
    store.write("shards/000000.tar", bytes(10**6))
    get_file, calls = store._files._fs.get_file, []

    def cut(path, local, **options):
        calls.append(path)
        get_file(path, local, **options)
        if len(calls) == 1:
            os.truncate(local, 1000)
            raise OSError("the line is cut")

    monkeypatch.setattr(store._files._fs, "get_file", cut)
    with store.open("shards/000000.tar") as file:
        assert file.read() == bytes(10**6)
    assert len(calls) == 2


@pytest.mark.parametrize("writable", [True, False])
def test_s3_that_refuses_us(s3, told, writable):
    for code in ("403 InvalidAccessKeyId", "403 SignatureDoesNotMatch", "403 AccessDenied"):
        s3.server.fail(100, code)
        with takes(0, QUICK), refused(f"^{s3.url}: cannot be .*: It is broken"):
            open_store(s3.url, 60, told.append, writable)
        s3.server.heal()
    assert told == []


@pytest.mark.parametrize("writable", [True, False])
def test_s3_without_credentials(s3, told, writable, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with takes(0, QUICK), refused("cannot be .*NoCredentialsError: Unable to locate credentials"):
        open_store(s3.url, 60, told.append, writable)
    assert told == []


def test_a_bucket_that_is_not_there(s3, told):
    for name in ("no-such-bucket", "No Bucket!"):
        with takes(0, QUICK), refused(f"^s3://{name}/out: cannot be written: .*bucket.*--out$"):
            open_store(f"s3://{name}/out", 60, told.append)
    assert open_store("s3://no-such-bucket/out", writable=False).names("") == []
    assert told == []


def test_nobody_listens(s3, told, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with takes(PATIENCE, PATIENCE), refused("cannot be written: EndpointConnectionError: Could not connect"):
        open_store(s3.url, PATIENCE, told.append)
    assert len(told) <= 1


def test_a_package_that_is_not_there(monkeypatch):
    import fsspec  # noqa: F401, its registry remembers what was imported

    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
        with (
            takes(0, QUICK),
            refused(rf"^{scheme}://b/out needs {package}; write pip install 'fogsculpt\[jobs\]'$"),
        ):
            open_store(f"{scheme}://b/out")


def test_a_store_without_conditional_writes(s3, monkeypatch):
    """Some of those that speak S3 ignore what they do not know; then two would draw the same."""
    work = s3.server._moto

    def forgetful(environ, start):
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return work(environ, start)

    monkeypatch.setattr(s3.server, "_moto", forgetful)
    with takes(0, QUICK), refused("it lets two create the same object"):
        open_store(s3.url)


def test_gs_that_fails(gs, told):
    store = open_store(gs.url, 60, told.append)
    gs.failures.extend([HTTPStatus.SERVICE_UNAVAILABLE] * 2)
    store.write("a", b"x")
    assert told == [f"{gs.url}: HttpError: , 503; trying again for up to 60 s"]
    gs.failures.append(HTTPStatus.FORBIDDEN)
    with takes(0, QUICK), refused("cannot be written: .*Forbidden"):
        open_store(gs.url, 60)
    with takes(0, QUICK), refused(r"^gs://no-such-bucket/out: cannot be written: .*--out$"):
        open_store("gs://no-such-bucket/out", 60)
    store = open_store(gs.url, PATIENCE)
    gs.failures.extend([HTTPStatus.INTERNAL_SERVER_ERROR] * 10_000)
    with takes(PATIENCE, PATIENCE), refused("500; once that is mended, the same command goes on"):
        store.write("a", b"x")


# ---- disks


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
def test_a_disk_that_is_full_for_a_while(disk, told, tmp_path, call, monkeypatch):
    full_disk(monkeypatch, 2)
    call(disk)
    out = tmp_path / "out"
    assert told == [f"{out}: No space left on device; trying again for up to {PATIENCE:g} s"]
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


def test_without_patience_there_is_one_try(s3, told):
    store = open_store(s3.url, 0, told.append)
    s3.server.seen.clear()
    s3.server.fail(10_000)
    with takes(0, 0), refused("It is broken"):
        store.write("a", b"x")
    assert len(s3.server.seen) == 1 and told == []


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


def test_many_threads_meet_the_same_trouble(s3, told):
    store = open_store(s3.url, 60, told.append)
    s3.server.fail(20, methods=("PUT",))
    threads = [threading.Thread(target=store.write, args=(str(number), b"x")) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.names("") == sorted(map(str, range(8)))
    assert len(told) <= 8


def test_the_spool_s_disk_is_named_where_it_is_full(s3, tmp_path, told):
    store = open_store(s3.url, 0, told.append)
    where = re.escape(str(tmp_path / f"fogsculpt-{os.getuid()}"))
    with largest_file(1000), refused(rf"^{where} \(TMPDIR\): cannot be written: File too large"):
        store.patiently(lambda: (store.spool() / "a").write_bytes(bytes(10_000)))
    assert isinstance(store.spool(), pathlib.Path)
