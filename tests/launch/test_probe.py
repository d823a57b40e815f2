"""python -m launch.probe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.evaluate import reader, reader_training
from engine.train import loop
from launch import cli, probe
from tests.long import LONG


@LONG  # the trainer is that of all stages
def test_its_training_learns_and_goes_on(tmp_path):
    stage = dataclasses.replace(reader_training.stage(12), batch_size=16, ema=(0.5,), checkpoint_every=8)
    stage.optim = dataclasses.replace(stage.optim, warmup_steps=2, decay_steps=2)
    params = probe.train(tmp_path / "first", stage)
    batch = {name: jnp.asarray(each) for name, each in reader_training.batches(16)(0).items()}
    key = jax.random.key(0)

    @jax.jit
    def loss(params):
        return reader_training.loss(params, None, batch, key)[0]

    assert loss(params) < 0.9 * loss(reader.init(jax.random.key(0)))
    again = probe.train(tmp_path / "first", stage)
    np.testing.assert_array_equal(again["what.weight"], params["what.weight"])
    reader.save(params, tmp_path / "probe.safetensors")
    further = probe.train(tmp_path / "further", stage, tmp_path / "probe.safetensors")
    assert loss(further) < loss(params)


def test_a_probe_is_trained(tmp_path, monkeypatch, capsys):
    def trained(workdir, stage, start, tellers, seed):
        return reader.init(jax.random.key(seed))

    monkeypatch.setattr(probe, "train", trained)
    command = [f"--workdir={tmp_path}", "--test_renders=20", "--seed=1"]
    assert cli.exit_code(probe.main, command) == cli.DONE
    assert capsys.readouterr().out.count("%") == len(reader.QUESTIONS)
    found = reader.load(tmp_path / "probe.safetensors")
    kept = np.asarray(reader.init(jax.random.key(1))["stem.weight"], np.float16)
    np.testing.assert_array_equal(found["stem.weight"], kept)


def test_another_seed_is_another_probe_of_other_renders(tmp_path, monkeypatch):
    """And the same for its own next start; nothing is trained here."""
    seen = []

    def fit(name, loss, params, frozen, optimizer, stage, *, seed, batch_at, workdir):
        seen.append((seed, params["stem.weight"], batch_at(0)["image"]))

    monkeypatch.setattr(loop, "fit", fit)
    stage = dataclasses.replace(reader_training.stage(12), batch_size=4)
    for seed in (0, 1, 1):
        probe.train(tmp_path, stage, seed=seed)
    one, other, again = seen
    assert (one[0], other[0]) == (0, 1)
    for i in (1, 2):
        assert (one[i] != other[i]).mean() > 0.5
        np.testing.assert_array_equal(other[i], again[i])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "write --workdir"),
        (["--workdir=a", "--tellers=-1"], "tellers=-1: write 0 or more"),
        (["--workdir=x", "--test_renders=0"], "test_renders=0: write 1 or more"),
        (["--workdir=x", "--seed=-1"], "seed=-1: write a number from 0"),
        (["--workdir=x", "--steps=0"], "steps=0: write 1 or more"),
        (["--workdir=x", "--start=no.safetensors"], "there is no probe no.safetensors"),
        (["--workdir=file", "--steps=1"], "/file/probe cannot be written: Not a directory"),
    ],
)
def test_mistakes_of_launch_probe(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.exit_code(probe.main, argv) == cli.MISTAKE
    assert told in capsys.readouterr().err
