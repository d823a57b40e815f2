"""A long job, watched: is it as fast at the end as at the beginning, and does its memory stay flat?

  python -m tests.faults.long --pictures 100000 --tiny             (16 px, a tiny model of random weights)
  python -m tests.faults.long --minutes 30 --steps 8               (the model in the package)

Prints a table of tenths: pictures, images/s, and the memory of the process (resident, MiB: mean and largest).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np

from tests.tiny import tiny_folder

ROOT = pathlib.Path(__file__).parents[2]
TENTHS = 10
EVERY = 1.0  # seconds between looks at the memory
WORDS = {
    "colour": ("red", "blue", "green", "yellow"),
    "thing": ("fox", "cat", "dog", "car", "rocket", "tree", "house", "owl"),
    "place": ("at sunset", "at night", "in the snow", "on the grass", "in the desert"),
}


class Look(NamedTuple):
    """What was seen at one moment."""

    time: float  # seconds since 1970
    memory: float  # MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1_000_000, help="of the job")
    parser.add_argument("--minutes", type=float, help="after which the job is stopped")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of the one in the package")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--format", default="webdataset")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        looks = watch(folder, command(folder, options), options.minutes)
        told = (folder / "told.txt").read_text().splitlines()
        print(f"{told[-1]}\n\n{table(folder / 'out', looks)}")


def command(folder: pathlib.Path, options: argparse.Namespace) -> list[str]:
    """launch.generate on a file of many different prompts."""
    with open(folder / "prompts.txt", "w") as file:
        for number in range(options.pictures):
            words, rest = [], number
            for choices in WORDS.values():
                rest, which = divmod(rest, len(choices))
                words.append(choices[which])
            file.write(f"a {words[0]} {words[1]} {words[2]}, number {rest}\n")
    flags = {"prompts_file": folder / "prompts.txt", "out": folder / "out", "seed": 7}
    flags |= {"steps": options.steps, "format": options.format}
    if options.tiny:
        flags["model"] = tiny_folder(folder / "model")
    return [sys.executable, "-m", "launch.generate", *(f"--{name}={value}" for name, value in flags.items())]


def watch(folder: pathlib.Path, command: list[str], minutes: float | None) -> list[Look]:
    """Runs the command, at most so long; returns what was seen of its process."""
    looks, began = [], time.monotonic()
    with open(folder / "told.txt", "w") as told:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=told,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        while process.poll() is None:
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                process.terminate()
                process.wait()
                break
            looks.append(Look(time.time(), memory_of(process.pid)))
            time.sleep(EVERY)
    return looks


def memory_of(pid: int) -> float:
    """Resident memory of a process in MiB; 0 where it has just ended."""
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def table(out: pathlib.Path, looks: list[Look]) -> str:
    """Tenths of the time from the end of the first shard to the end of the last, from the manifests."""
    manifests = [json.loads(path.read_text()) for path in (out / "manifests").iterdir()]
    ended = np.array(sorted((m["ended"], len(m["pictures"])) for m in manifests))
    edges = np.linspace(ended[0, 0], ended[-1, 0], TENTHS + 1)
    done = np.interp(edges, ended[:, 0], ended[:, 1].cumsum())
    lines = ["tenth   pictures  images/s   MiB mean   MiB most"]
    for i in range(TENTHS):
        memory = [look.memory for look in looks if edges[i] <= look.time <= edges[i + 1]] or [0.0]
        pictures, rate = done[i + 1] - done[i], (done[i + 1] - done[i]) / (edges[i + 1] - edges[i])
        lines.append(f"{i + 1:5d} {pictures:10.0f} {rate:9.2f} {np.mean(memory):10.1f} {max(memory):10.1f}")
    rates = np.diff(done)
    lines.append(f"last tenth / first tenth: speed {rates[-1] / rates[0]:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
