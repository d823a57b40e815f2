"""One of the hosts of test_hosts.py: trains a tiny model with the others, and reads damaged checkpoints.

  python -m tests.processes.one_host --work=DIR --cases CASES ... \
    --processes=N --process_id=I --coordinator=HOST:PORT

It writes DIR/host-I.json: what it saw, by the names of the cases.
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from engine.config import OptimConfig, StageConfig
from engine.parallel import meet
from engine.train import loop, optim
from engine.train.checkpoint import Checkpoints
from engine.train.step import TrainState
from engine.types import UserError
from tests.compiled import COMPILED

CONFIG = StageConfig(
    steps=4,
    batch_size=8,
    ema=(0.9,),
    checkpoint_every=2,
    keep_last=4,
    shard_params=True,
    optim=OptimConfig(learning_rate=0.1, warmup_steps=0, decay_steps=0),
)
LONG = dataclasses.replace(CONFIG, steps=16, checkpoint_every=100)
SIGNALLED = 5  # the batch at which a signal comes
# Of numpy, as JAX must not begin before the hosts have met. Noise, so that the largest files hold it. All is
# split over the devices: of what all have, Orbax writes more than it reads, and damage there is none.
KERNEL = np.random.default_rng(0).standard_normal((16, 96), np.float32)
PARAMS = {"layers": {i: {"kernel": KERNEL} for i in range(3)}}
BLOCKING = ("process_allgather", "broadcast_one_to_all", "sync_global_devices", "assert_equal")


def squares(params, frozen, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    y = sum(x @ layer["kernel"] for layer in params["layers"].values())
    return jnp.mean(jnp.square(y)), {}


def batch_at(step: int):
    rows = CONFIG.batch_size // jax.process_count()
    return {"x": np.random.default_rng([step, jax.process_index()]).standard_normal((rows, 16), np.float32)}


def signalled(host: int):
    """Batches with which a signal comes, to one host alone."""

    def batch(step: int):
        if step == SIGNALLED and jax.process_index() == host:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    return batch


def fit(workdir: pathlib.Path, config: StageConfig = CONFIG, batch_at=batch_at):
    optimizer = optim.optimizer(config.optim, config.steps)
    return loop.fit(
        "tiny", squares, PARAMS, {}, optimizer, config, seed=0, batch_at=batch_at, workdir=workdir
    )


def counted() -> collections.Counter[str]:
    """From here on, how often this host waited for the others, by the function that it waited in."""
    count = collections.Counter()

    def counting(name: str, wait):
        def waiting(*args, **kwargs):
            count[name] += 1
            return wait(*args, **kwargs)

        return waiting

    for name in BLOCKING:
        setattr(multihost_utils, name, counting(name, getattr(multihost_utils, name)))
    return count


def lengths(work: pathlib.Path) -> dict[str, dict]:
    """Runs of two lengths, after one that compiles what they have in common."""
    waits, seen = counted(), {}
    for name, steps in {"first": 4, "short": 4, "long": 16}.items():
        waits.clear()
        COMPILED.clear()
        fit(work / name, dataclasses.replace(LONG, steps=steps))
        seen[name] = {"waits": dict(waits), "compiled": dict(COMPILED)}
    return seen


def stops(work: pathlib.Path) -> dict[str, dict]:
    """Runs in which a signal comes to one host, and then the run goes on; the last saves what is damaged."""
    seen = {}
    for host in range(jax.process_count()):
        with saves() as saved:
            first = fit(work / f"signal-{host}", LONG, signalled(host))
            second = fit(work / f"signal-{host}", LONG)
        seen[f"signal-{host}"] = {"saved": saved, "stopped": [first is None, second is None]}
    fit(work / "whole")
    return seen


@contextlib.contextmanager
def saves() -> Iterator[list[int]]:
    """The steps that are saved."""
    found, save = [], Checkpoints.save

    def noted(self: Checkpoints, state: TrainState, position: dict) -> None:
        found.append(int(state.step))
        save(self, state, position)

    Checkpoints.save = noted
    try:
        yield found
    finally:
        Checkpoints.save = save


def reads(work: pathlib.Path) -> dict[str, dict]:
    """What comes of each folder of damaged checkpoints; "other": of which one host wants another state."""
    seen = {}
    for folder in sorted((work / "damaged").iterdir()):
        other = folder.name == "other" and jax.process_index() == 1
        refusing = folder.name == "no room"
        with mock.patch("pathlib.Path.rename", full) if refusing else contextlib.nullcontext():
            seen[folder.name] = read(folder, dataclasses.replace(CONFIG, ema=(0.5,)) if other else CONFIG)
    return seen | {"elsewhere": read(work / f"of-host-{jax.process_index()}", CONFIG)}


def full(*_) -> None:
    """In place of renaming: a disk that refuses."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read(folder: pathlib.Path, config: StageConfig) -> dict:
    """The step that is read, or the error; what was told; and the newest step is saved again."""
    devices, init, _ = loop.program("tiny", squares, PARAMS, optim.optimizer(config.optim, 4), config)
    like = loop.placed(jax.eval_shape(init, PARAMS), devices.shardings)
    seen = {}
    with contextlib.redirect_stdout(io.StringIO()) as told:
        try:
            with Checkpoints(folder) as checkpoints:
                state = checkpoints.restore(like)
                seen["step"] = int(state.step)
                checkpoints.save(state._replace(step=devices.share(np.int32(CONFIG.steps))), {})
        except UserError as error:
            seen["error"] = str(error)
    return seen | {"told": told.getvalue()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process_id", type=int)
    parser.add_argument("--coordinator")
    given = parser.parse_args()
    heard = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: heard.set())
    meet(given.coordinator, given.processes, given.process_id)
    os.kill(os.getpid(), signal.SIGTERM)
    found = {"met": {"heard": heard.wait(10)}}
    for cases in given.cases:
        found |= {"lengths": lengths, "stops": stops, "reads": reads}[cases](given.work)
    (given.work / f"host-{given.process_id}.json").write_text(json.dumps(found))
