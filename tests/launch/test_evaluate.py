"""python -m launch.evaluate."""

import functools

import jax
import pytest

from engine.evaluate import probe, probe_training
from launch import cli, evaluate
from tests.tiny import tiny_folder


def test_it_measures_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe_training, "trained", lambda: probe.init(jax.random.key(0)))
    monkeypatch.setattr(probe_training, "accuracy", functools.partial(probe_training.accuracy, n=20))
    folder = tiny_folder(tmp_path / "model")
    command = ["--model", str(folder), "--num_prompts=3", "--steps=2", "--batch_size=2"]
    assert cli.exit_code(evaluate.main, command) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["renders", "single", "two"]
    for line in lines[1:]:
        assert line.split()[1::2] == ["things", "background", "arrangement", "all"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--num_prompts=0"], "num_prompts=0: write 1 or more"),
        (["--seed=-1"], "seed=-1: write a number from 0"),
        (["a fox"], "'a fox' is no flag"),
        (["--model=nowhere"], "nowhere"),
        (["--gidance_scale=3"], "did you mean --guidance_scale?"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, argv, told):
    monkeypatch.setattr(probe_training, "trained", lambda: pytest.fail("trained the probe first"))
    assert cli.exit_code(evaluate.main, argv) == cli.MISTAKE
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_steps_are_checked_before_the_probe_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe_training, "trained", lambda: pytest.fail("trained the probe first"))
    assert cli.exit_code(evaluate.main, ["--model", str(tiny_folder(tmp_path / "m")), "--steps=0"]) == 2
    assert "steps=0" in capsys.readouterr().err
