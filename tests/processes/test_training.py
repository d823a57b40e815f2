"""Two processes that train together are one that trains alone; what two have saved, one goes on with."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from engine.weights.component import load_component
from tests.tiny import tiny_folder

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_folder(folder / "model")
    (folder / "pictures").mkdir()
    for i in range(8):
        image = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(image).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"a red fox {i}")
    return folder


def train(folder, run, steps, devices, processes=1, shard_params=False):
    """launch.train in so many processes, each with so many simulated devices; what they tell."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{found.getsockname()[1]}"
    flags = [
        "--config=configs/finetune.py",
        f"--workdir={folder / run}",
        f"--config.model={folder / 'model'}",
        f"--config.data.paths=('{folder / 'pictures'}',)",
        f"--config.finetune.steps={steps}",
        "--config.finetune.batch_size=8",
        "--config.finetune.optim.learning_rate=1e-3",
        "--config.finetune.optim.warmup_steps=0",
        "--config.finetune.optim.decay_steps=0",
        f"--config.finetune.shard_params={shard_params}",
    ]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with contextlib.ExitStack() as stack:
        workers = []
        for i in range(processes):
            own = [f"--processes={processes}", f"--process_id={i}", f"--coordinator={coordinator}"]
            command = [sys.executable, "-m", "launch.train", *flags, *own]
            worker = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            workers.append(worker)
        told = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(told)
    return told


def losses(folder, run):
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def weights(folder, run):
    params = load_component(folder / run / "model" / "unet", "unet").params
    return np.concatenate([np.ravel(leaf) for leaf in _leaves(params)])


def _leaves(tree):
    if not isinstance(tree, dict):
        return [np.asarray(tree)]
    return [leaf for key in sorted(tree, key=str) for leaf in _leaves(tree[key])]


@pytest.mark.parametrize("shard_params", [False, True], ids=["copies", "shards"])
def test_two_processes_train_and_save_and_one_goes_on(folder, shard_params):
    run = f"two-{shard_params}"
    told = train(folder, run, 3, devices=2, processes=2, shard_params=shard_params)
    assert "model:" in told[0] and "model:" not in told[1]
    assert "goes on from step 3" in train(folder, run, 5, devices=1)[0]
    if not (folder / "alone").exists():
        train(folder, "alone", 3, devices=1)
        train(folder, "alone", 5, devices=1)
    for step in (3, 5):
        assert losses(folder, run)[step] == pytest.approx(losses(folder, "alone")[step], rel=1e-4)
    np.testing.assert_allclose(weights(folder, run), weights(folder, "alone"), atol=2e-3)
