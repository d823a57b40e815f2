"""The peak of memory while a model is read and written, seen from outside, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.weights.random_folder import ARCHITECTURES, random_folder
from tests.weights.test_random_folder import TINY

# 75 million parameters, 300 MB in float32: the U-Net of Stable Diffusion, narrower.
UNET = ARCHITECTURES["sd15"].unet
NARROW = TINY._replace(unet=type(UNET)(block_out_channels=(96, 192, 384, 384), cross_attention_dim=24))

# VmHWM is the peak of resident memory; pages of a mapped file would count.
MEASURE = """
import json, sys
import jax, jax.numpy as jnp
from engine.weights.folder import load_folder, save_folder

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

jax.block_until_ready(jnp.zeros(8))  # the backend is up
before = resident("VmRSS")
model = load_folder(sys.argv[1], dtype=sys.argv[2])
loaded = resident("VmHWM")
save_folder(sys.argv[3], model)
parts = (model.unet, model.vae, model.text_encoder)
size = sum(leaf.nbytes for leaf in jax.tree.leaves([part.params for part in parts]))
print(json.dumps({"size": size, "load": loaded - before, "save": resident("VmHWM") - before}))
"""
BOOKKEEPING = 60e6  # bytes: modules traced, headers, the largest tensor twice


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow") / "model"
    random_folder(path, NARROW, "float32")
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_is_the_model_and_little_more(folder, tmp_path, dtype):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, dtype, tmp_path / "again"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    shutil.rmtree(tmp_path / "again")
    told = json.loads(run.stdout)
    assert told["size"] > 70e6 * (4 if dtype == "float32" else 2)
    assert told["size"] <= told["load"] < 1.3 * told["size"] + BOOKKEEPING
    assert told["save"] < 1.3 * told["size"] + BOOKKEEPING
