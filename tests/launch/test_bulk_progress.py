"""What a worker of a job says of how far the job is."""

import threading
import types

from engine.jobs.claims import Claims
from engine.jobs.store import open_store
from launch import bulk, cli


def test_an_elastic_worker_sees_what_others_have_done(tmp_path):
    """Its own shards are no part of it."""
    group = {"first_shard": 0, "count": 9, "settings": {}}
    about = {"fingerprint": {"shard_size": 2}, "shards": 5, "groups": [group]}
    shards = types.SimpleNamespace(describe=lambda: about, shard=lambda number: number)
    store, seen = open_store(str(tmp_path)), []

    def finish(*numbers):
        for number in numbers:
            store.write(f"manifests/{number:06d}.json", b"{}")

    finish(0)
    with Claims(store, 60) as claims:
        taken = bulk.take(shards, store, claims, threading.Event(), seen.append)
        assert next(taken) == 1 and seen[-1] == 2
        finish(1, 4)  # the last one has a single picture
        assert next(taken) == 2 and seen[-1] == 3
        finish(2, 3)
        assert list(taken) == [] and seen[-1] == 5


def test_time_left_is_that_of_all_workers(monkeypatch, capsys):
    clock = iter([0, 10, 20, 30])
    monkeypatch.setattr(bulk, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(bulk, "LINE_EVERY", 5)
    progress = bulk.Progress(total=100, done=20)
    progress.elsewhere(50)
    progress.step(10)  # at 10 s; the rates are of 20 and of 30 s
    assert capsys.readouterr().err == "60/100 images, 0.5 images/s (1.33 with other workers), 30 s left\n"


def test_an_elastic_worker_alone_has_made_all_of_it(job, monkeypatch):
    noted = []
    monkeypatch.setattr(bulk.Progress, "elsewhere", lambda self, pictures: noted.append(pictures))
    assert job("--elastic").code == cli.DONE
    assert noted and set(noted) == {0}
