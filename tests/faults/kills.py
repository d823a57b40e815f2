"""Workers of a job that die at random moments; at the end every picture is there once, and the right one."""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from tests.tiny import tiny_folder

ROOT = pathlib.Path(__file__).parents[2]
BIRTH = 4.0  # seconds until a worker begins to draw, about
STILLBORN = 0.3  # share of workers that die before
SHARD_SIZE = 8


class Workshop:
    """A job of many small pictures with a tiny model, and the workers that draw it."""

    def __init__(self, folder: pathlib.Path, pictures: int, *flags: object):
        """Args:
        pictures: of the job.
        flags: for launch.generate, beside those below.
        """
        self.folder, self.pictures = folder, pictures
        model = tiny_folder(folder / "model")
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"a red fox, {number} times\n" for number in range(pictures)))
        own = {
            "prompts_file": prompts,
            "model": model,
            "steps": 2,
            "batch_size": 8,
            "shard_size": 8,
            "seed": 7,
        }
        self.flags = [*(f"--{name}={value}" for name, value in own.items()), *map(str, flags)]
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(folder / "cache"),  # of compiled programs; also written by those that die
        }

    def command(self, out: pathlib.Path | str, *flags: object) -> list[str]:
        """The command of a worker."""
        return [sys.executable, "-m", "launch.generate", *self.flags, f"--out={out}", *map(str, flags)]

    def start(self, out: pathlib.Path | str, *flags: object) -> subprocess.Popen:
        """A worker. What it says goes to a file."""
        with open(self.folder / "told.txt", "ab") as told:
            return subprocess.Popen(
                self.command(out, *flags),
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=told,
            )

    def told(self) -> str:
        """The last lines that workers have said."""
        return (self.folder / "told.txt").read_text(errors="replace")[-2000:]

    def finish(self, out: pathlib.Path | str, *flags: object) -> None:
        """A worker that nobody disturbs."""
        check(self.command(out, *flags), self.environment)

    def verify(self, out: pathlib.Path | str) -> None:
        """--verify finds every picture once."""
        told = check([sys.executable, "-m", "launch.generate", f"--verify={out}"], self.environment)
        assert told.splitlines()[-1] == f"{self.pictures} pictures and 0 failures: all sound", told


def check(command: Sequence[str], environment: dict[str, str] | None) -> str:
    """Runs a command that must succeed, in this environment or ours; returns what it says."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout} {done.stderr}"
    return done.stdout


def hashes(out: pathlib.Path) -> dict[int, str]:
    """number -> sha256 of its PNG, of all pictures that are there."""
    manifests = [json.loads(path.read_text()) for path in (out / "manifests").iterdir()]
    return {p["number"]: p["sha256"] for manifest in manifests for p in manifest["pictures"]}


def shards(out: pathlib.Path) -> int:
    """How many are done."""
    with contextlib.suppress(FileNotFoundError):
        return sum(name.endswith(".json") for name in os.listdir(out / "manifests"))
    return 0


def random_moment(shop: Workshop, out: pathlib.Path, done: float, dice: random.Random) -> None:
    """Waits for a moment for a worker to die: before it has begun, or when that share of shards is done."""
    if dice.random() < STILLBORN:
        time.sleep(dice.uniform(0, BIRTH))
        return
    aim, latest = done * shop.pictures / SHARD_SIZE, time.monotonic() + 60
    while shards(out) < aim:
        assert time.monotonic() < latest, f"no shard for a minute: {shop.told()}"
        time.sleep(0.005)
    time.sleep(dice.uniform(0, 0.2))


def kill_and_restart(
    shop: Workshop, out: pathlib.Path, kills: int, dice: random.Random, tell: Callable[[str], None] = print
) -> None:
    """One worker, killed so many times at random moments and started again; then left to finish."""
    with ended() as alive:
        for number in range(kills):
            alive.append(shop.start(out))
            random_moment(shop, out, (number + dice.random()) / (1.25 * kills + 1), dice)
            kill(alive.pop())
            tell(f"kill {number + 1} of {kills}: {shards(out)} shards are done")
    shop.finish(out)


def come_and_go(
    shop: Workshop,
    out: pathlib.Path,
    workers: int,
    kills: int,
    dice: random.Random,
    tell: Callable[[str], None] = print,
) -> None:
    """Workers that share the job by claims. Now and then one is killed, and later another is added."""
    flags = ("--elastic", "--lease=5")
    with ended() as alive:
        alive += [shop.start(out, *flags) for _ in range(workers)]
        for number in range(kills):
            random_moment(shop, out, (number + dice.random()) / (1.25 * kills + 1), dice)
            kill(alive.pop(dice.randrange(len(alive))))
            tell(f"kill {number + 1} of {kills}: {shards(out)} shards are done")
            if len(alive) == 1 or dice.random() < 0.7:
                alive += [shop.start(out, *flags) for _ in range(dice.randint(1, workers - len(alive)))]
        for worker in alive:
            assert worker.wait(600) == 0, shop.told()


def kill(worker: subprocess.Popen) -> None:
    """kill -9, of a worker that must not be done yet."""
    assert worker.poll() is None, f"a worker ended with code {worker.returncode}"
    worker.kill()
    worker.wait()


@contextlib.contextmanager
def ended() -> Iterator[list[subprocess.Popen]]:
    """A list of workers, none of which outlives the context."""
    alive: list[subprocess.Popen] = []
    try:
        yield alive
    finally:
        for worker in alive:
            worker.kill()
            worker.wait()
