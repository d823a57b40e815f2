"""The model in the package: its size, its words, and the same pictures in PyTorch diffusers."""

import os
import subprocess
import sys

import numpy as np
import pytest

import engine
from engine import world
from engine.loading import SHIPPED, SHIPPED_NAME
from engine.text.prompts import unread
from tests import compiling
from tests.long import LONG
from tests.parity.pictures import NEGATIVES, PROMPTS, draw_in_pytorch, psnr

MOST_BYTES = 64 * 2**20
STEPS = 10


def test_it_is_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) <= MOST_BYTES


def test_it_knows_the_words_of_its_world():
    tokenizer = engine.load().model.tokenizer
    assert set(tokenizer.known_words) >= {"fox", "cat", "car", "scarlet", "sunset", "skateboard"}
    assert not unread(sorted(world.words()), tokenizer)
    assert "zeppelin" in unread(["a zeppelin"], tokenizer)[0]


@LONG  # with fewer steps in the last test here
@pytest.mark.parametrize("steps", [STEPS, 30])
def test_same_picture_as_pytorch(steps):
    pipe = engine.load()
    assert pipe.name == SHIPPED_NAME
    height, width = pipe.default_size
    shape = (2, height // 4, width // 4, pipe.model.vae.config.latent_channels)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    ours = pipe.generate(PROMPTS, NEGATIVES, steps=steps, guidance_scale=5.0, latents=latents)
    theirs = draw_in_pytorch(
        SHIPPED, latents, negative_prompt=NEGATIVES, num_inference_steps=steps, guidance_scale=5.0
    )
    assert psnr(ours, theirs) >= 40
    assert psnr(ours[::-1], theirs) < 20  # another picture is told apart


def test_words_change_the_picture():
    pipe = engine.load()
    night, snow = pipe.generate(["a fox at night", "a fox in the snow"], seed=0, steps=30).mean((1, 2, 3))
    assert night < snow - 50


def test_same_picture_as_pytorch_as_users_compile_it():
    """The tests compile otherwise, for speed (tests/compiling.py): here once as XLA does for everyone."""
    ours = (compiling.LEAST, "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    test = f"{__file__}::{test_same_picture_as_pytorch.__name__}[{STEPS}]"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", test]
    environment["FOGSCULPT_LONG"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
