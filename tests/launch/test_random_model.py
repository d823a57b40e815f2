"""python -m launch.random_model."""

import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from engine.weights import random_folder
from engine.weights.folder import load_folder
from tests.weights.test_random_folder import TINY


def test_it_writes_a_model(tmp_path, monkeypatch, capsys):
    from launch import random_model

    flags.FLAGS.mark_as_parsed()
    monkeypatch.setitem(random_folder.ARCHITECTURES, "tiny", TINY)
    with flagsaver.flagsaver(architecture="tiny", out=str(tmp_path / "model"), dtype="bfloat16", seed=3):
        random_model.main([])
        assert capsys.readouterr().out == f"model: {tmp_path / 'model'}\n"
        assert load_folder(tmp_path / "model").unet.config == TINY.unet
        with pytest.raises(SystemExit, match="2"):
            random_model.main([])
    assert "model already exists" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.random_model",
        "--architecture",
        "ds15",
        "--out",
        tmp_path / "model",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "unknown architecture 'ds15' (did you mean sd15?); known: sd15, sd21\n"
    assert list(tmp_path.iterdir()) == []
