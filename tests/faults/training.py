"""A training that is killed at random moments ends with the params of one that nobody disturbed."""

import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.faults.kills import ROOT, check, ended, kill
from tests.tiny import SHALLOW, tiny_folder

STARTING = 8.0  # seconds or so before the first step
LONGEST_LIFE = 3.0  # seconds after the first checkpoint of a life
DIES_STARTING = 0.2  # the share of lives that end before
LONGEST_START = 300.0  # seconds, on a machine that is very busy


class School:
    """A fine-tuning of a tiny model."""

    def __init__(self, folder: pathlib.Path, steps: int):
        self.folder = folder
        tiny_folder(folder / "model", **SHALLOW)
        (folder / "pictures").mkdir()
        for i in range(8):
            image = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(image).save(folder / "pictures" / f"{i}.png")
            (folder / "pictures" / f"{i}.txt").write_text(f"a red fox {i}")
        stage = {"steps": steps, "batch_size": 4, "checkpoint_every": 20, "ema": "(0.99,)"}
        self.flags = [
            "--config=configs/finetune.py",
            f"--config.model={folder / 'model'}",
            f"--config.data.paths=('{folder / 'pictures'}',)",
            *(f"--config.finetune.{name}={value}" for name, value in stage.items()),
        ]

    def command(self, run: str) -> list[str]:
        return [sys.executable, "-m", "launch.train", *self.flags, f"--workdir={self.folder / run}"]

    def steps(self, run: str) -> int:
        """Of the newest checkpoint."""
        names = (path.name for path in (self.folder / run / "finetune").glob("*"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def weights(self, run: str) -> bytes:
        (file,) = (self.folder / run / "model" / "unet").glob("*.safetensors")
        return file.read_bytes()


def live(school: School, run: str, program: subprocess.Popen, dice: random.Random, longest: float) -> None:
    """Waits for the moment of the next kill: while it starts, or soon after its first checkpoint."""
    if dice.random() < DIES_STARTING:
        time.sleep(dice.uniform(0, STARTING))
        return
    before, deadline = school.steps(run), time.monotonic() + LONGEST_START
    while school.steps(run) == before:
        assert program.poll() is None, "the training ended by itself: see told.txt"
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    time.sleep(dice.uniform(0, longest))


def kill_and_go_on(
    school: School,
    run: str,
    kills: int,
    dice: random.Random,
    tell: Callable[[str], None] = print,
    longest_life: float = LONGEST_LIFE,
) -> None:
    """Killed so many times, then left to finish."""
    with ended() as alive:
        for number in range(kills):
            with open(school.folder / "told.txt", "ab") as told:
                alive.append(subprocess.Popen(school.command(run), cwd=ROOT, stdout=told, stderr=told))
            live(school, run, alive[-1], dice, longest_life)
            kill(alive.pop())
            tell(f"kill {number + 1} of {kills}: the newest checkpoint is of step {school.steps(run)}")
    check(school.command(run), None)
