"""A tiny model in a folder, and launch.generate on it, in this process."""

import functools
import inspect
import json
import pathlib
from typing import NamedTuple

import pytest

import engine
from engine import loading
from launch import generate
from tests.backgrounds import few
from tests.tiny import tiny_folder

ROWS = [
    {"prompt": "a red fox at night"},
    {"prompt": "a cat", "negative_prompt": "a dog", "note": "carried"},
    {"prompt": "a dog", "seed": 5, "steps": 3},
    {"prompt": "two trees", "guidance_scale": 1},
    {"prompt": "a wide car", "width": 24, "id": "wide"},
    {"prompt": "a car", "guidance_scale": 3.5},
    {"prompt": "a cat above a dog", "sampler": "ddim"},
]


@pytest.fixture(scope="package", autouse=True)
def few_backgrounds():
    with few():
        yield


class Outcome(NamedTuple):
    """What a run of the program leaves."""

    code: int
    paths: list[pathlib.Path]  # the lines of stdout
    told: list[str]  # the lines of stderr


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """16 px pictures. Read it, do not write into it."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def load_once():
    """engine.load with a memory: what it has compiled serves all tests of a file."""
    cached = functools.cache(loading.load)

    def load(*args):
        bound = inspect.signature(loading.load).bind(*args)
        bound.apply_defaults()
        return cached(*bound.args)

    load.cache_clear = cached.cache_clear
    return load


@pytest.fixture
def run(load_once, monkeypatch, capsys):
    """python -m launch.generate with these arguments."""
    monkeypatch.setattr(engine, "load", load_once, raising=False)

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = generate.run([str(arg) for arg in argv])
        said, told = capsys.readouterr()
        return Outcome(code, [pathlib.Path(line) for line in said.splitlines()], told.splitlines())

    return run


@pytest.fixture
def draw(run, model, tmp_path):
    """The same with the tiny model, two steps, two pictures at once and the folder `out`, unless told."""

    def draw(*argv: object) -> Outcome:
        defaults = ("--model", model, "--steps", 2, "--batch_size", 2, "--out", tmp_path / "out")
        return run(*defaults, *argv)

    return draw


@pytest.fixture
def prompts(tmp_path):
    """Writes rows into a file and gives its path."""

    def write(rows=ROWS, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def job(draw, prompts):
    """A job of ROWS in shards of two, seed 7, unless told."""

    def job(*argv, rows=ROWS):
        return draw("--prompts_file", prompts(rows), "--seed", 7, "--shard_size", 2, *argv)

    return job
