"""Workers that are killed and come again: the short form of python -m tests.faults."""

import random

import pytest

from tests.faults import kills as faults
from tests.faults.training import School, kill_and_go_on
from tests.long import LONG

KILLS, ELASTIC_KILLS, TRAINING_KILLS = 5, 4, 1
PICTURES, STEPS = 400, 100


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return faults.Workshop(tmp_path_factory.mktemp("faults"), PICTURES)


@pytest.fixture(scope="module")
def right(shop, tmp_path_factory):
    """The pictures of a run that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shop.finish(out)
    return faults.hashes(out)


def test_a_worker_that_is_killed_again_and_again(shop, right, tmp_path):
    faults.kill_and_restart(shop, tmp_path / "out", KILLS, random.Random(1))
    shop.verify(tmp_path / "out")
    assert faults.hashes(tmp_path / "out") == right


@LONG  # each alone: tests/jobs/test_claims.py, tests/launch/test_bulk.py
def test_workers_that_come_and_go(shop, right, tmp_path):
    faults.come_and_go(shop, tmp_path / "out", 4, ELASTIC_KILLS, random.Random(2))
    shop.verify(tmp_path / "out")
    assert faults.hashes(tmp_path / "out") == right


@LONG  # tests/train/test_resume.py kills one, too
def test_a_training_that_is_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    # Most of a life is the compiler's: only the first compiles.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    school = School(tmp_path, STEPS)
    faults.check(school.command("undisturbed"), None)
    kill_and_go_on(school, "killed", TRAINING_KILLS, random.Random(3), longest_life=1.0)
    assert school.weights("killed") == school.weights("undisturbed")
