"""The loop around the steps: progress, checkpoints, and a way out that loses nothing."""

import contextlib
import json
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax

from engine.config import StageConfig
from engine.parallel import Devices
from engine.train import step as steps
from engine.train.checkpoint import Checkpoints
from engine.train.data import BatchAt, batches
from engine.types import Params, UserError

REPORT_SECONDS = 10.0


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, so that the loop can save before it ends."""
    stop = threading.Event()
    previous = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Progress:
    """A line every few seconds on the terminal and in metrics.jsonl: loss, images/s, time left."""

    def __init__(self, name: str, file: pathlib.Path, first_step: int, config: StageConfig):
        self._name, self._file, self._config = name, file, config
        self._step, self._time = first_step, time.monotonic()

    def report(self, step: int, metrics: steps.Metrics, force: bool = False) -> None:
        now = time.monotonic()
        if step == self._step or (now - self._time < REPORT_SECONDS and not force):
            return
        values = {k: float(v) for k, v in metrics.items()}  # waits for the device: now only
        rate = (step - self._step) / (time.monotonic() - self._time)
        self._step, self._time = step, time.monotonic()
        images = rate * self._config.batch_size
        with self._file.open("a") as f:
            f.write(
                json.dumps({"stage": self._name, "step": step, "images/s": round(images, 2), **values}) + "\n"
            )
        left = int((self._config.steps - step) / rate)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        print(
            f"{self._name} {step}/{self._config.steps}  {shown}  {images:.1f} images/s  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            flush=True,
        )


def fit(
    name: str,
    loss: steps.Loss,
    params: Params,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    config: StageConfig,
    *,
    seed: int,
    batch_at: BatchAt,
    workdir: pathlib.Path,
) -> Params | None:
    """Trains `params` to the end of the stage, from its newest checkpoint if there is one.

    Args:
      batch_at: the data, see `engine.train.data`.

    Returns:
      The averaged params, or None when a signal stopped the run (the checkpoint is then saved).
    """
    devices = Devices("jit")  # the compiler adds the sum of the gradients over the devices
    if config.batch_size % devices.count:
        raise UserError(
            f"{name}.batch_size={config.batch_size}: write a multiple of the {devices.count} devices here"
        )
    checkpoints = Checkpoints(workdir / name)
    state = devices.share(steps.init(params, optimizer))
    frozen = devices.share(frozen)
    base_key = jax.random.key(seed, impl="threefry2x32")
    if checkpoints.latest() is not None:
        state, _ = checkpoints.restore(state)
        print(f"{name}: goes on from step {int(state.step)}", flush=True)
    step = jax.jit(steps.train_step(loss, optimizer, config.ema_decay), donate_argnums=0)
    first = int(state.step)
    data = batches(batch_at, first)
    progress = Progress(name, workdir / "metrics.jsonl", first, config)

    def save(at: int) -> None:
        checkpoints.save(state, {"seed": seed, "data": {"next": at * config.batch_size}})

    before = None
    try:
        with stop_signals() as stop, contextlib.closing(data):
            for i in range(first, config.steps):
                state, metrics = step(state, frozen, devices.shard_batch(next(data)), base_key)
                # One step may be under way while the next is prepared, not dozens: a signal waits for them.
                jax.block_until_ready(before)
                before = metrics
                progress.report(i + 1, metrics, force=i + 1 == config.steps)
                if stop.is_set() or (i + 1) % config.checkpoint_every == 0 or i + 1 == config.steps:
                    save(i + 1)
                if stop.is_set():
                    print(f"{name}: stopped and saved at step {i + 1}; the same command goes on", flush=True)
                    return None
    finally:
        checkpoints.close()
    return state.ema_params
