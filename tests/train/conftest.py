"""Training steps, as all that is tiny, are compiled quickly; and runs that are disturbed."""

import pytest

from engine.loading import use_compilation_cache
from engine.train import loop
from tests.backgrounds import few
from tests.tiny import compiled_quickly
from tests.train.sharing import shared


@pytest.fixture(scope="package", autouse=True)
def quick_compiler():
    use_compilation_cache()  # many tests compile the same
    with compiled_quickly():
        yield


@pytest.fixture(scope="package", autouse=True)
def few_backgrounds():
    with few():
        yield


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with shared():
        yield


@pytest.fixture
def in_stage(monkeypatch):
    """Calls `happen` when `stage`, and no other, asks for the batch of `step`; once."""
    draw, running, plans = loop.batches, [], []

    class Progress(loop.Progress):
        """Made once a stage, before its first batch: tells which one runs."""

        def __init__(self, name, *args):
            super().__init__(name, *args)
            running[:] = [name]

    def watched_batches(batch_at, first_step):
        for i, batch in enumerate(draw(batch_at, first_step), first_step):
            if plans and plans[0][:2] == (running[0], i):
                plans.pop()[2]()
            yield batch

    monkeypatch.setattr(loop, "Progress", Progress)
    monkeypatch.setattr(loop, "batches", watched_batches)
    return lambda stage, step, happen: plans.append((stage, step, happen))
