"""python -m launch.evaluate --world grown, and launch.probe."""

import json

import jax
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


def test_it_measures_a_model_of_the_grown_world(tmp_path, monkeypatch, capsys, probe_file):
    monkeypatch.setattr(launch_composing, "AMONG", 50)
    monkeypatch.setattr(launch_composing, "SAMPLES", 3)
    out = tmp_path / "results"
    command = ["--world=grown", f"--probe={probe_file}", f"--model={tiny_folder(tmp_path / 'model')}"]
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


def test_a_probe_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reader_training, "train", lambda workdir: reader.init(jax.random.key(1)))
    assert cli.exit_code(probe.main, [f"--workdir={tmp_path}", "--test_renders=20"]) == cli.DONE
    assert capsys.readouterr().out.count("%") == len(reader.QUESTIONS)
    reader.load(tmp_path / "probe.safetensors")


@pytest.mark.parametrize(
    ("argv", "told"), [([], "write --workdir"), (["--workdir=x", "--test_renders=0"], "0")]
)
def test_mistakes_of_launch_probe(capsys, argv, told):
    assert cli.exit_code(probe.main, argv) == cli.MISTAKE
    assert told in capsys.readouterr().err
