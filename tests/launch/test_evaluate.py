"""python -m launch.evaluate, on a model of the drawn world."""

import json

import jax
import pytest
from PIL import Image

from engine.evaluate import composing, reader
from launch import cli, evaluate
from launch import composing as launch_composing
from tests.tiny import tiny_folder


@pytest.fixture
def probe_file(tmp_path):
    reader.save(reader.init(jax.random.key(0)), tmp_path / "probe.safetensors")
    return tmp_path / "probe.safetensors"


def folder_of(size, path):
    """A tiny model that draws `size` pixels."""
    config = tiny_folder(path) / "unet" / "config.json"
    options = json.loads(config.read_text())
    config.write_text(json.dumps(options | {"sample_size": size // 16 * options["sample_size"]}))
    return path


def test_it_measures_a_model(tmp_path, monkeypatch, capsys, probe_file):
    monkeypatch.setattr(launch_composing, "AMONG", 50)
    monkeypatch.setattr(launch_composing, "SAMPLES", 3)
    monkeypatch.setattr(reader, "SHIPPED", probe_file)
    out = tmp_path / "results"
    command = [f"--model={folder_of(32, tmp_path / 'model')}", f"--out={out}"]
    command += ["--num_prompts=3", "--steps=2", "--batch_size=2"]
    assert cli.exit_code(evaluate.main, command) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(launch_composing.COLUMNS)
    names = [kind + ", held out" * held_out for kind, held_out in composing.groups()]
    for name, *both in zip(names, lines[1:10], lines[11:20], strict=True):
        assert all(line.startswith(name) and line.count("%") >= 5 for line in both)
    report = json.loads((out / "evaluation.json").read_text())
    assert list(report["table"]) == names
    assert report["prompts"] == 3 and report["frechet_distance"]["pictures"] > 0
    assert list(report["renders"]) == names
    for name in ("best-and-worst.png", "neighbours.png"):
        with Image.open(out / name) as sheet:
            sheet.load()
            assert sheet.width > 500 and sheet.height > 200
        assert str(out / name) in lines


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--num_prompts=0"], "num_prompts=0: write 1 or more"),
        (["--seed=-1"], "seed=-1: write a number from 0"),
        (["a fox"], "'a fox' is no flag"),
        (["--gidance_scale=3"], "did you mean --guidance_scale?"),
        (["--probe=nowhere"], "there is no probe nowhere: write a file that launch.probe has made"),
        (["--train_seed=-1"], "train_seed=-1: write a number from 0 to 2^32 - 1"),
        (["--probe=probe.safetensors", "--model=nowhere"], "nowhere"),
        (["--probe=probe.safetensors", "--model=small", "--lora=no.safetensors"], "no.safetensors"),
        (["--probe=probe.safetensors", "--steps=0", "--model=small"], "steps=0"),
        (
            ["--probe=probe.safetensors", "--model=small"],
            "this model draws 16 x 16 px, and no scenes: they are squares of a multiple of 32",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, probe_file, argv, told):
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "small")
    assert cli.exit_code(evaluate.main, argv) == cli.MISTAKE
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
