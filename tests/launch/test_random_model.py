"""python -m launch.random_model."""

import pytest

from engine.weights import random_folder
from engine.weights.folder import load_folder
from launch import cli, random_model
from tests.weights.test_random_folder import TINY


def test_it_writes_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(random_folder.ARCHITECTURES, "tiny", TINY)
    out = tmp_path / "model"
    command = ["--architecture", "tiny", "--dtype=bfloat16", "--seed=3", "--out", str(out)]
    assert cli.exit_code(random_model.main, command) == cli.DONE
    assert capsys.readouterr().out == f"{out}\n"
    assert load_folder(out).unet.config == TINY.unet
    assert b'"dtype":"BF16"' in (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert cli.exit_code(random_model.main, command) == cli.MISTAKE
    assert "model already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--architecture=ds15", "--out=x"], "unknown architecture 'ds15' (did you mean sd15?)"),
        (["--dtype=float64", "--out=x"], "write float32, float16 or bfloat16"),
        (["--seed=-1", "--out=x"], "seed=-1: write a number from 0"),
        (["--out=/proc/x"], "/proc/x cannot be written"),
        ([], "write --out FOLDER"),
        (["x"], "write --out x"),
        (["--archtecture=sd15"], "unknown flag --archtecture (did you mean --architecture?)"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    assert cli.exit_code(random_model.main, argv) == cli.MISTAKE
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag(capsys):
    assert cli.exit_code(random_model.main, ["--help"]) == cli.DONE
    text = capsys.readouterr().out
    assert all(f"--{flag}" in text for flag in [*random_model.DEFAULTS, "out"])
