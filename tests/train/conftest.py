"""Training steps, as all that is tiny, are compiled quickly; and runs that are disturbed."""

import json
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from engine.config import DataConfig, FinetuneConfig, FinetuneStage, OptimConfig
from engine.loading import use_compilation_cache
from engine.train import loop, plot
from tests.backgrounds import few
from tests.tiny import SHALLOW, compiled_quickly, tiny_folder
from tests.train.sharing import shared

COLOURS = {"red": (220, 30, 30), "blue": (30, 40, 220), "green": (30, 200, 60), "white": (250, 250, 250)}


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


@pytest.fixture(scope="module", autouse=True)
def plots(request):
    """Of each stage, in half a second: drawn where that is tested, and where whole models are trained."""
    if request.module.__name__.rpartition(".")[2] in ("test_progress", "test_own"):
        yield
        return
    with mock.patch.object(plot, "loss_plot", plot.lines_of):
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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", **SHALLOW)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight plain pictures: four colours, lighter above or below."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for colour, rgb in COLOURS.items():
        for place in ("above", "below"):
            paint(folder / f"{colour}-{place}.png", rgb, place)
            lines.append(
                json.dumps({"file_name": f"{colour}-{place}.png", "text": f"a {colour} car {place}"})
            )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def paint(file, rgb, place):
    image = np.full((16, 16, 3), rgb, np.uint8)
    rows = slice(0, 8) if place == "above" else slice(8, 16)
    image[rows] //= 2
    Image.fromarray(image).save(file)


@pytest.fixture
def config(model, pictures):
    """Four steps of four pictures, unless told."""

    def config(what="unet", steps=4, stage=None, **options):
        own = {"batch_size": 4, "ema": (0.5,), "checkpoint_every": 100, "caption_dropout": 0.0}
        own |= stage or {}
        optimizer = own.pop("optim", OptimConfig(learning_rate=1e-3, warmup_steps=0, decay_steps=0))
        return FinetuneConfig(
            model=str(model),
            what=what,
            data=DataConfig(paths=(str(pictures),)),
            finetune=FinetuneStage(steps=steps, optim=optimizer, **own),
            **options,
        )

    return config
