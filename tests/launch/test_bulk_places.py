"""Jobs whose output folder is in S3, and whose output folder fails in the middle."""

import json
import os
import resource

import pytest

from engine.jobs import folder
from engine.jobs.store import open_store
from launch import cli
from tests.jobs.s3_server import s3, s3_server  # noqa: F401

PICTURES = 7  # of the job in conftest.py


def pictures(url) -> dict[int, str]:
    """number -> sha256, of all manifests."""
    store = open_store(str(url))
    manifests = [folder.read_manifest(store, name) for name in folder.done(store)]
    return {p["number"]: p["sha256"] for manifest in manifests for p in manifest["pictures"]}


@pytest.fixture
def whole(job, tmp_path):
    """The pictures of a job that nobody disturbs."""
    assert job("--out", tmp_path / "whole").code == cli.DONE
    return pictures(tmp_path / "whole")


@pytest.fixture
def after_a_shard(monkeypatch):
    """Something happens once, when the first shard is done."""
    commit = folder.commit

    def after_a_shard(happens):
        def commit_then(*arguments):
            committed = commit(*arguments)
            monkeypatch.setattr(folder, "commit", commit)
            happens()
            return committed

        monkeypatch.setattr(folder, "commit", commit_then)

    return after_a_shard


def check_stopped(outcome, run, url, *words, code=cli.MISTAKE):
    """One line says why, and what is there is whole; returns how many shards are done."""
    assert outcome.code == code, outcome.told
    last = outcome.told[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last
    assert sum("trying again" in line for line in outcome.told) <= 1, outcome.told
    verified = run("--verify", url)
    assert verified.code == cli.FAILED  # some shards are open
    (verdict,) = map(str, verified.paths)
    assert "all sound" in verdict and "shards are not done" in verdict
    return len(folder.done(open_store(str(url))))


def check_goes_on(job, run, url, whole):
    outcome = job("--out", url)
    assert outcome.code == cli.DONE, outcome.told
    assert pictures(url) == whole
    assert run("--verify", url).code == cli.DONE


# S3


@pytest.mark.parametrize("format", ["files", "webdataset", "arrayrecord", "parquet"])
def test_a_job_in_s3(job, run, s3, whole, format):  # noqa: F811
    outcome = job("--out", s3.url, "--format", format)
    assert outcome.code == cli.DONE, outcome.told
    assert pictures(s3.url) == whole
    assert run("--verify", s3.url).code == cli.DONE
    assert "shards    6 of 6 done, 0 claimed" in map(str, run("--status", s3.url).paths)
    assert run("--merge", s3.url).code == cli.DONE
    lines = open_store(s3.url).read("index.jsonl").splitlines()
    assert {line["number"]: line["sha256"] for line in map(json.loads, lines)} == whole
    assert job("--out", s3.url, "--format", format).paths == [], "nothing is left to do"


def test_workers_with_claims_in_s3(job, run, s3, whole):  # noqa: F811
    assert job("--out", s3.url, "--elastic").code == cli.DONE
    assert pictures(s3.url) == whole
    assert open_store(s3.url).names("claims") == []


def test_s3_that_fails_for_a_while(job, run, s3, whole, after_a_shard):  # noqa: F811
    after_a_shard(lambda: s3.server.fail(3))
    outcome = job("--out", s3.url)
    assert outcome.code == cli.DONE, outcome.told
    assert s3.server.faults_left == 0
    assert 1 <= sum("trying again" in line for line in outcome.told) <= 3
    assert pictures(s3.url) == whole


@pytest.mark.parametrize("trouble", ["fail", "hang"])
def test_s3_that_fails_for_good(job, run, s3, whole, after_a_shard, trouble):  # noqa: F811
    after_a_shard(lambda: getattr(s3.server, trouble)(1000))
    try:
        outcome = job("--out", s3.url, "--patience", 1)
    finally:
        s3.server.heal()
    assert check_stopped(outcome, run, s3.url, s3.url, code=cli.PASSING) == 1
    check_goes_on(job, run, s3.url, whole)


def test_answers_of_s3_that_get_lost(job, run, s3, whole, after_a_shard):  # noqa: F811
    after_a_shard(lambda: s3.server.lose_answers(4, methods=("PUT",)))
    assert job("--out", s3.url).code == cli.DONE
    assert pictures(s3.url) == whole
    assert run("--verify", s3.url).code == cli.DONE


# disks


def test_a_disk_that_is_full(job, run, tmp_path, whole, after_a_shard):
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    after_a_shard(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1])))
    try:
        outcome = job("--out", out, "--patience", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert check_stopped(outcome, run, out, "cannot be written") == 1
    check_goes_on(job, run, out, whole)


def test_a_folder_that_becomes_read_only(job, run, tmp_path, whole, after_a_shard):
    out, user = tmp_path / "out", os.geteuid()

    def close():
        for place in (out, *out.iterdir()):
            place.chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # nobody

    after_a_shard(close)
    try:
        outcome = job("--out", out, "--patience", 1)
    finally:
        os.seteuid(user)
        for place in (out, *out.iterdir()):
            place.chmod(0o755)
    assert check_stopped(outcome, run, out, "Permission denied") == 1
    check_goes_on(job, run, out, whole)


def test_a_folder_that_goes_away(job, run, tmp_path, whole, after_a_shard):
    out, away = tmp_path / "out", tmp_path / "away"

    def unmount():
        out.rename(away)
        out.mkdir()  # as the mount point of a disk that is gone

    after_a_shard(unmount)
    outcome = job("--out", out, "--patience", 1)
    assert list(out.iterdir()) == [], "what is written there would be lost"
    out.rmdir()
    away.rename(out)
    assert check_stopped(outcome, run, out, "the folder has gone", code=cli.PASSING) == 1
    check_goes_on(job, run, out, whole)
