"""The contract of the output folder, the same on a disk and in object stores."""

import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from engine.errors import UserError
from engine.jobs import scratch
from engine.jobs.store import open_store

THREADS, PROCESSES = 8, 3


@pytest.fixture(params=["disk", "s3", "gs"])
def url(request, tmp_path, monkeypatch):
    """Of an empty output folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return str(tmp_path / "out") if request.param == "disk" else request.getfixturevalue(request.param).url


@pytest.fixture
def store(url):
    return open_store(url)


def in_threads(do, count=THREADS):
    """Runs do(0), do(1), ... all at once; what one raises is raised here."""
    start, errors = threading.Barrier(count), []

    def run(number):
        start.wait()
        try:
            do(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Child:
    """Another process, that runs a program after `store = open_store(...)`; it says 'ready' first."""

    def __init__(self, url, program):
        program = (
            "import sys; from engine.jobs.store import open_store; store = open_store(sys.argv[1])\n"
            f"print('ready', flush=True); sys.stdin.readline()\n{program}"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", program, url], text=True, **pipes)

    def wait_until_ready(self):
        assert self.process.stdout.readline() == "ready\n"

    def go(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def local_folder(store, name, files):
    folder = store.spool() / name
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


# ---- files


def test_what_is_written_can_be_read(store):
    store.write("job.json", b"one")
    assert store.read("job.json") == b"one"
    store.write("job.json", b"another, longer")
    assert store.read("job.json") == b"another, longer"
    store.write_once("claims/a.0", b"")
    assert store.read("claims/a.0") == b""
    with store.open("job.json") as file:
        assert file.read() == pathlib.Path(file.name).read_bytes() == b"another, longer"
        assert file.seek(9) == 9 and file.read() == b"longer"


def test_what_is_not_there(store):
    for path in ("job.json", "manifests/000000.json"):
        with pytest.raises(FileNotFoundError):
            store.read(path)
        with pytest.raises(FileNotFoundError):
            store.open(path)
        store.delete(path)
    assert store.names("manifests") == []
    store.write("manifests/000001.json", b"")
    for _ in range(2):
        store.delete("manifests/000001.json")
    assert store.names("manifests") == []


def test_names_are_sorted_and_without_dots(store):
    for name in ("b", "a", "c", ".hidden"):
        store.write(f"claims/{name}", b"x")
    store.write("job.json", b"x")
    store.spool()
    assert store.names("claims") == ["a", "b", "c"]
    assert store.names("") == ["claims", "job.json"]


def test_times_are_in_the_order_of_writing(store):
    assert store.times("claims") == {}
    before = time.time()
    for name in ("b", "a", "c"):
        store.write(f"claims/{name}", b"x")
        time.sleep(1.1)  # S3 tells seconds
    times = store.times("claims")
    assert times["b"] < times["a"] < times["c"]
    assert before - 2 < times["b"] and times["c"] < time.time() + 2


def test_a_store_that_is_only_read_makes_nothing(url):
    store = open_store(url, writable=False)
    assert store.names("") == store.names("claims") == []
    with pytest.raises(FileNotFoundError):
        store.read("job.json")
    if "://" not in url:
        assert not os.path.exists(url)


def test_readers_see_whole_contents_only(store):
    old, new = b"a" * 300_000, b"b" * 200_000
    store.write("index.jsonl", old)
    reads, ended = [0], threading.Event()

    def take_part(number):
        if number:
            while not ended.is_set():
                assert store.read("index.jsonl") in (old, new)
                reads[0] += 1
            return
        try:
            round = 0
            while round < 20 or reads[0] < 20:
                store.write("index.jsonl", new if round % 2 else old)
                round += 1
        finally:
            ended.set()

    in_threads(take_part, 3)


# ---- create


def test_one_of_many_threads_creates_a_file(store):
    winners = []

    def want(number):
        for file in range(10):
            if store.create(f"claims/{file}", b"worker %d" % number):
                winners.append((file, number))

    in_threads(want)
    assert sorted(file for file, _ in winners) == list(range(10))
    for file, number in winners:
        assert store.read(f"claims/{file}") == b"worker %d" % number


@pytest.mark.parametrize("url", ["disk", "s3"], indirect=True)
def test_one_of_many_processes_creates_a_file(url):
    program = (
        "import os\n"
        "for file in range(20): print(store.create(f'claims/{file}', str(os.getpid()).encode()), flush=True)"
    )
    children = [Child(url, program) for _ in range(PROCESSES)]
    for child in children:
        child.wait_until_ready()
    for child in children:
        child.go()
    won = [child.process.communicate()[0].split() for child in children]
    assert [answers.count("True") for answers in zip(*won, strict=True)] == [1] * 20


def test_create_tells_whether_it_is_there_with_these_bytes(store):
    assert store.create("claims/a.0", b"mine")
    assert store.create("claims/a.0", b"mine")  # as after an answer that was lost
    assert not store.create("claims/a.0", b"yours")
    assert store.read("claims/a.0") == b"mine"
    store.delete("claims/a.0")
    assert store.create("claims/a.0", b"yours")


# ---- publish


def test_publish_a_file(store):
    for data in (b"first", b"second"):
        path = store.spool() / "000000.tar"
        path.write_bytes(data)
        store.publish(path, "shards/000000.tar")
        assert store.read("shards/000000.tar") == data
        assert not path.exists()


def test_publish_a_folder_over_a_leftover(store):
    leftover = {"1.png": b"old", "2.png": b"old", "extra.png": b"old"}
    store.publish(local_folder(store, "000000", leftover), "shards/000000")
    assert store.names("shards/000000") == sorted(leftover)
    whole = {"1.png": b"new", "2.png": b"old", "3.png": b"new"}
    folder = local_folder(store, "000000", whole)
    store.publish(folder, "shards/000000")
    assert {name: store.read(f"shards/000000/{name}") for name in store.names("shards/000000")} == whole
    assert not folder.exists()
    assert store.names("shards") == ["000000"]


def test_a_folder_that_was_published_half_is_published_whole(url, monkeypatch):
    """Also over a leftover: what the first try has moved is no extra file of the second."""
    told = []
    store = open_store(url, tell=told.append, pause=lambda _: None)
    store.publish(local_folder(store, "000000", {"1.png": b"old", "0.png": b"old"}), "shards/000000")
    whole = {f"{number}.png": b"new" for number in range(1, 9)}
    folder = local_folder(store, "000000", whole)
    calls = []

    def failing_at_the_third(do):
        def do_or_fail(*args, **options):
            calls.append(args)
            if len(calls) == 3:
                raise OSError("a cable fell out")
            return do(*args, **options)

        return do_or_fail

    if "://" in url:
        fs = store._files._fs
        monkeypatch.setattr(fs, "_put_file", failing_at_the_third(fs._put_file))
    else:
        monkeypatch.setattr(os, "replace", failing_at_the_third(os.replace))
    store.publish(folder, "shards/000000")
    assert {name: store.read(f"shards/000000/{name}") for name in store.names("shards/000000")} == whole
    assert told == [f"{url}: a cable fell out; trying again for up to 60 s"]


# ---- the scratch folder


def scratch_folders(url, tmp_path):
    commons = [pathlib.Path(url) / ".scratch", tmp_path / "tmp" / f"fogsculpt-{os.getuid()}"]
    return [folder for common in commons if common.is_dir() for folder in common.iterdir()]


@pytest.mark.parametrize("url", ["disk"], indirect=True)
def test_the_scratch_folder_goes_with_its_process(url, tmp_path):
    child = Child(
        url, "print(store.spool(), flush=True); (store.spool() / 'a').touch(); sys.stdin.readline()"
    )
    child.wait_until_ready()
    child.go()
    spool = pathlib.Path(child.process.stdout.readline().strip())
    store = open_store(url)
    assert spool.is_dir(), "it lives"
    assert store.spool() != spool
    child.go()
    child.process.communicate()
    assert not spool.exists()
    mine = store.spool()
    assert scratch_folders(url, tmp_path) == [mine]


@pytest.mark.parametrize("url", ["disk", "s3"], indirect=True)
def test_the_scratch_folder_of_a_killed_process_goes_with_the_next(url, tmp_path):
    child = Child(
        url, "(store.spool() / 'a').touch(); print(store.spool(), flush=True); sys.stdin.readline()"
    )
    child.wait_until_ready()
    child.go()
    spool = pathlib.Path(child.process.stdout.readline().strip())
    child.process.kill()
    child.process.communicate()
    assert (spool / "a").exists()
    store = open_store(url)
    assert not spool.exists()
    mine = store.spool()
    assert scratch_folders(url, tmp_path) == [mine]


def test_nobody_clears_the_scratch_folder_of_one_who_begins(tmp_path):
    common = tmp_path / ".scratch"
    ended = threading.Event()

    def take_part(number):
        if number >= 3:
            while not ended.is_set():
                scratch.Scratch(common).clear()
            return
        try:
            for _ in range(80):
                mine = scratch.Scratch(common)  # the one before goes, and maybe the common folder with it
                (mine.folder() / "a").write_bytes(b"")
                assert (mine.folder() / "a").exists()
        finally:
            if number == 0:
                ended.set()

    in_threads(take_part, 5)


def test_the_scratch_folder_of_another_machine_is_cleared_after_a_day(tmp_path):
    """There are file systems on which nobody sees the locks of other machines."""
    common = tmp_path / ".scratch"
    for name in (f"{scratch.MACHINE}-new", "another-new", "another-old"):
        (common / name).mkdir(parents=True)
        (common / name / scratch.LOCK).touch()
    os.utime(common / "another-old", (0, 0))
    scratch.Scratch(common).clear()
    assert [folder.name for folder in common.iterdir()] == ["another-new"]


def test_a_scratch_folder_that_vanished_is_made_again(store):
    first = store.spool()
    (first / scratch.LOCK).unlink()
    first.rmdir()
    assert store.spool().is_dir()
    store.write("job.json", b"x")
    assert store.read("job.json") == b"x"


# ---- urls


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/folder", r"ftp:// is unknown; write a local path, s3://\.\.\. or gs://\.\.\."),
        ("s3://", "names no bucket; write s3://BUCKET/FOLDER"),
        ("gs:///", "names no bucket; write gs://BUCKET/FOLDER"),
    ],
)
def test_urls_that_name_no_place(url, message):
    with pytest.raises(UserError, match=message):
        open_store(url)


def test_a_bucket_itself(s3):
    store = open_store(f"s3://{s3.name}/")
    assert store.url == f"s3://{s3.name}"
    store.write("claims/a", b"x")
    assert open_store(f"s3://{s3.name}", writable=False).names("claims") == ["a"]


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/out").url == str(tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_long_listings_come_in_pages(s3, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")
    store = open_store(s3.url)
    names = [f"{number:06d}.json" for number in range(20)]
    folder = local_folder(store, "000000", dict.fromkeys(names, b"x"))
    store.publish(folder, "manifests")
    s3.server.seen.clear()
    assert store.names("manifests") == names
    assert len(s3.server.seen) == 3, "pages"


def test_an_object_of_the_folder_s_own_name_is_no_file(s3):
    """As consoles make it for an empty folder."""
    store = open_store(s3.url)
    store.write("failures/", b"")
    store.write("failures/000001.jsonl", b"x")
    assert store.names("failures") == ["000001.jsonl"]
