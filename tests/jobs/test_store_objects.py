"""Object stores that fail: tried again while patience lasts, then one line, and nothing half-written."""

import itertools
import os
import re
import sys
import threading
from http import HTTPStatus

import pytest

from engine.jobs import places
from engine.jobs import store as stores
from engine.jobs.store import open_store
from tests.jobs.failing import CALLS, PATIENCE, QUICK, made, refused, takes
from tests.test_finish_disks import largest_file

TIMEOUT = 0.3  # seconds
BROKEN = "(It is broken|Internal Server Error|Service Unavailable)"  # HEAD is answered without a text
SOME_CALLS = {name: CALLS[name] for name in ("create", "open", "names", "publish")}


@pytest.fixture
def short_timeouts(monkeypatch):
    monkeypatch.setattr(stores, "SHORTEST_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(stores, "LONGEST_TIMEOUT", TIMEOUT)


def test_s3_that_fails_for_a_while(s3, told):
    store = open_store(s3.url, 60, told.append, pause=lambda _: None)
    for code, name in itertools.product(("500 InternalError", "503 SlowDown"), CALLS):
        store.write("there", b"x")
        told.clear()
        s3.server.fail(2, code)
        CALLS[name](store)
        assert s3.server.faults_left == 0 and len(told) == 1, name
        assert re.fullmatch(f"{s3.url}: {BROKEN}; trying again for up to 60 s", told[0]), name


@pytest.mark.parametrize("call", SOME_CALLS.values(), ids=SOME_CALLS)
def test_s3_that_fails_for_ever(s3, told, call):
    store = open_store(s3.url, PATIENCE, told.append)
    store.write("there", b"x")
    s3.server.fail(10_000)
    with takes(PATIENCE, PATIENCE), refused(f"^{s3.url}.*: cannot be .*: {BROKEN}; .* goes on$"):
        call(store)
    assert len(told) <= 1  # none where the machine is so busy that patience has ended by then


def test_what_failed_for_ever_can_be_done_later(s3):
    store = open_store(s3.url, PATIENCE)
    folder = made(store)
    s3.server.fail(10_000, methods=("PUT",))
    with refused("cannot be written: It is broken"):
        store.publish(folder, "shards/000000")
    s3.server.heal()
    store.publish(folder, "shards/000000")
    assert store.names("shards/000000") == ["a", "b", "c"]


def test_s3_that_hangs(s3, told, short_timeouts):
    store = open_store(s3.url, 60, told.append)
    for name, call in SOME_CALLS.items():
        store.write("there", b"x")
        told.clear()
        s3.server.hang(1)
        call(store)
        assert s3.server.faults_left == 0
        assert told == [f"{s3.url}: no answer within {TIMEOUT:g} s; trying again for up to 60 s"], name
    store._patience = PATIENCE
    s3.server.hang(10_000)
    for call in SOME_CALLS.values():
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
    store._patience = PATIENCE
    s3.server.lose_answers(10_000)
    with (
        takes(PATIENCE, PATIENCE),
        refused("cannot be read: .*; once that is mended, the same command goes on"),
    ):
        store.read("a")


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
    for code in ("403 InvalidAccessKeyId", "403 SignatureDoesNotMatch"):
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


def test_mistakes_in_programs_are_not_tried_again(s3, told, monkeypatch):
    store = open_store(s3.url, 60, told.append)

    def mistake(path, **options):
        return {}["a key"]

    monkeypatch.setattr(store._files._fs, "cat_file", mistake)
    with takes(0, QUICK), pytest.raises(KeyError):
        store.read("a")
    assert told == []


def test_without_patience_there_is_one_try(s3, told):
    store = open_store(s3.url, 0, told.append)
    s3.server.seen.clear()
    s3.server.fail(10_000)
    with takes(0, 0), refused("It is broken"):
        store.write("a", b"x")
    assert len(s3.server.seen) == 1 and told == []


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
