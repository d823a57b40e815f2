"""A tiny model in a folder, and launch.generate on it, in this process."""

import functools
import pathlib
from typing import NamedTuple

import pytest

import engine
from engine import pipeline
from launch import generate
from tests.tiny import tiny_folder


class Outcome(NamedTuple):
    """What a run of the program leaves."""

    code: int
    paths: list[pathlib.Path]  # the lines of stdout
    told: list[str]  # the lines of stderr


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """16 px pictures. Read it, do not write into it."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def load_once():
    """engine.load with a memory: what it has compiled serves all tests."""
    return functools.cache(pipeline.load)


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
