"""python -m launch.evaluate --world grown, and launch.probe."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from engine.evaluate import composing, reader, reader_training
from launch import cli, evaluate, probe
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


def test_it_measures_a_model_of_the_grown_world(tmp_path, monkeypatch, capsys, probe_file):
    monkeypatch.setattr(launch_composing, "AMONG", 50)
    monkeypatch.setattr(launch_composing, "SAMPLES", 3)
    out = tmp_path / "results"
    command = ["--world=grown", f"--probe={probe_file}", f"--model={folder_of(32, tmp_path / 'model')}"]
    command += ["--num_prompts=3", "--steps=2", "--batch_size=2", f"--out={out}"]
    assert cli.exit_code(evaluate.main, command) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(launch_composing.COLUMNS)
    names = [kind + ", held out" * held_out for kind, held_out in composing.groups()]
    for name, line in zip(names, lines[1:10], strict=True):
        assert line.startswith(name) and line.count("%") >= 5
    report = json.loads((out / "evaluation.json").read_text())
    assert list(report["table"]) == names
    assert report["prompts"] == 3 and report["frechet_distance"]["pictures"] > 0
    assert set(report["probe"]) == set(reader.QUESTIONS)
    for name in ("best-and-worst.png", "neighbours.png"):
        with Image.open(out / name) as sheet:
            sheet.load()
            assert sheet.width > 500 and sheet.height > 200
        assert str(out / name) in lines


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--world=grwn", "--probe=x"], "did you mean grown?"),
        (["--world=grown"], "write --probe FILE"),
        (["--world=grown", "--probe=nowhere"], "nowhere is no probe"),
        (["--world=grown", "--probe=x", "--num_prompts=0"], "num_prompts=0"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    assert cli.exit_code(evaluate.main, argv) == cli.MISTAKE
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_its_training_learns_and_goes_on(tmp_path):
    stage = dataclasses.replace(reader_training.stage(12), batch_size=16, ema=(0.5,), checkpoint_every=8)
    stage.optim = dataclasses.replace(stage.optim, warmup_steps=2, decay_steps=2)
    params = probe.train(tmp_path / "first", stage)
    batch = {name: jnp.asarray(each) for name, each in reader_training.batches(16)(0).items()}
    key = jax.random.key(0)
    before = reader_training.loss(reader.init(jax.random.key(0)), None, batch, key)
    assert reader_training.loss(params, None, batch, key)[0] < 0.9 * before[0]
    again = probe.train(tmp_path / "first", stage)
    np.testing.assert_array_equal(again["what.weight"], params["what.weight"])
    reader.save(params, tmp_path / "probe.safetensors")
    further = probe.train(tmp_path / "further", stage, tmp_path / "probe.safetensors")
    assert (
        reader_training.loss(further, None, batch, key)[0] < reader_training.loss(params, None, batch, key)[0]
    )


def test_a_model_of_another_size_is_refused(tmp_path, capsys, probe_file):
    command = ["--world=grown", f"--probe={probe_file}", f"--model={tiny_folder(tmp_path / 'model')}"]
    assert cli.exit_code(evaluate.main, [*command, f"--out={tmp_path}"]) == cli.MISTAKE
    assert (
        "this model draws 16 x 16 px: the grown world is squares of a multiple of 32"
        in capsys.readouterr().err
    )


def test_a_probe_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "train", lambda workdir, stage, start: reader.init(jax.random.key(1)))
    assert cli.exit_code(probe.main, [f"--workdir={tmp_path}", "--test_renders=20"]) == cli.DONE
    assert capsys.readouterr().out.count("%") == len(reader.QUESTIONS)
    reader.load(tmp_path / "probe.safetensors")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "write --workdir"),
        (["--workdir=x", "--test_renders=0"], "0"),
        (["--workdir=x", "--steps=0"], "0"),
        (["--workdir=x", "--start=no.safetensors"], "no.safetensors"),
    ],
)
def test_mistakes_of_launch_probe(capsys, argv, told):
    assert cli.exit_code(probe.main, argv) == cli.MISTAKE
    assert told in capsys.readouterr().err
