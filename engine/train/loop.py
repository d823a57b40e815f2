"""The loop around the steps: progress, checkpoints, and a way out that loses nothing."""

import contextlib
import functools
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from engine.config import StageConfig
from engine.parallel import SPLIT, Devices
from engine.train import ema, flops
from engine.train import step as steps
from engine.train.checkpoint import Checkpoints
from engine.train.data import BatchAt, batches
from engine.types import Params, UserError

REPORT_SECONDS = 10.0


class Watch(NamedTuple):
    """Something to do with the averaged params now and then."""

    every: int  # steps; 0: never
    call: Callable[[int, Params], Any]  # (steps done, params)


class Program(NamedTuple):
    """A training step for the devices at hand."""

    devices: Devices
    init: Callable[[Params], steps.TrainState]
    step: Callable[..., tuple[steps.TrainState, steps.Metrics]]  # gives back the memory of its state


def program(
    name: str, loss: steps.Loss, params: Params, optimizer: optax.GradientTransformation, config: StageConfig
) -> Program:
    """Builds the step; compiles nothing. With config.shard_params each device keeps a part of the state."""
    # Mode jit: the compiler adds the sum of the gradients over the devices.
    rules = SPLIT if config.shard_params else None
    devices = Devices("jit", rules=rules, all_hosts=jax.process_count() > 1)
    _check_batch(name, config, devices.count)
    init = functools.partial(steps.init, optimizer=optimizer, config=config)
    places = devices.shardings(jax.eval_shape(init, params))
    step = steps.train_step(loss, optimizer, config)
    return Program(
        devices,
        jax.jit(init, out_shardings=places),
        jax.jit(step, donate_argnums=0, out_shardings=(places, devices.whole_sharding)),
    )


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
    """A line every few seconds on the terminal and in metrics.jsonl: loss, images/s, time left.

    Metrics of more than one number go to the file alone, as lists.
    """

    def __init__(
        self,
        name: str,
        file: pathlib.Path,
        first_step: int,
        config: StageConfig,
        tells: bool = True,
        share_of_peak: float = 0.0,
    ):
        """Args:
        tells: of several hosts, one does.
        share_of_peak: what one step a second would be of the devices' peak rate; 0 where that is unknown.
        """
        self._name, self._file, self._config, self._tells = name, file, config, tells
        self._share_of_peak = share_of_peak
        self._step, self._time = first_step, time.monotonic()

    def report(self, step: int, metrics: steps.Metrics, force: bool = False) -> None:
        now = time.monotonic()
        if not self._tells or step == self._step or (now - self._time < REPORT_SECONDS and not force):
            return
        values = {k: np.asarray(v).tolist() for k, v in metrics.items()}  # waits for the device: now only
        rate = (step - self._step) / (time.monotonic() - self._time)
        if self._share_of_peak:
            values["mfu"] = rate * self._share_of_peak
        self._step, self._time = step, time.monotonic()
        images = rate * self._config.batch_size
        with self._file.open("a") as f:
            f.write(
                json.dumps({"stage": self._name, "step": step, "images/s": round(images, 2), **values}) + "\n"
            )
        left = int((self._config.steps - step) / rate)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
        if values.get("skipped"):
            shown += f"  {values['skipped']} skipped"
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
    watch: Watch | None = None,
) -> Params | None:
    """Trains `params` to the end of the stage, from its newest checkpoint if there is one.

    Where several processes have met (`engine.parallel.meet`), they train together: each calls this with the
    same arguments but for its data.

    Args:
      batch_at: the data, see `engine.train.data`; of several processes, the part of the batch that is this
        one's.

    Returns:
      The averaged params, or None when a signal stopped the run (the checkpoint is then saved).
    """
    devices, init, step = program(name, loss, params, optimizer, config)
    base_key = jax.random.key(seed, impl="threefry2x32")
    with Checkpoints(workdir / name, config.keep_last, config.keep_best) as checkpoints:
        state = init(devices.place_tree(params))
        frozen = devices.place_tree(frozen)
        if (newest := checkpoints.restore(state)) is not None:
            state = newest
            if devices.leads:
                print(f"{name}: goes on from step {int(state.step)}", flush=True)
        first = int(state.step)
        share = share_of_peak(devices, step, state, frozen, batch_at, base_key)
        progress = Progress(name, workdir / "metrics.jsonl", first, config, devices.leads, share)
        before = None
        with stop_signals() as stop, contextlib.closing(batches(batch_at, first)) as data:
            for done in range(first + 1, config.steps + 1):
                state, metrics = step(state, frozen, devices.shard_own(next(data)), base_key)
                last = done == config.steps
                # One step may be under way while the next is prepared, not dozens: a signal waits for them.
                _check_skipped(name, done - 1, before, config)
                before = metrics
                if last:
                    _check_skipped(name, done, metrics, config)
                progress.report(done, metrics, force=last)
                if config.ema_snapshot_every and (last or done % config.ema_snapshot_every == 0):
                    averages = devices.gather(state.ema_params)
                    if devices.leads:
                        ema.save_snapshots(workdir / name / "ema", done, averages, config)
                stopping = devices.any(stop.is_set())
                if last or stopping or (done % config.checkpoint_every == 0 and _is_sound(metrics)):
                    checkpoints.save(state, {"seed": seed, "data": {"next": done * config.batch_size}})
                if watch and watch.every and (last or done % watch.every == 0):
                    params = on_this_host(devices, state.ema_params[ema.chosen(config)])
                    if devices.leads:
                        watch.call(done, params)
                if stopping:
                    if devices.leads:
                        print(
                            f"{name}: stopped and saved at step {done}; the same command goes on", flush=True
                        )
                    return None
    return on_this_host(devices, state.ema_params[ema.chosen(config)])


def share_of_peak(
    devices: Devices, step: Callable, state: steps.TrainState, frozen: Any, batch_at: BatchAt, key: Any
) -> float:
    """What one step a second would be of all that the devices can do; 0 where that is unknown."""
    peak = flops.peak(devices.devices[0])
    if peak is None:
        return 0.0
    own = flops.count(step, state, frozen, batch_at(0), key)  # of this host's part of the batch
    return own * jax.process_count() / (peak * devices.count)


def on_this_host(devices: Devices, params: Params) -> Params:
    """Params that this host can read by itself. Where there are several, all must ask."""
    return params if devices.alone else devices.fetch(params)


def _check_batch(name: str, config: StageConfig, devices: int) -> None:
    if config.batch_size % (devices * config.accumulate):
        parts = f" times accumulate={config.accumulate}" if config.accumulate > 1 else ""
        raise UserError(
            f"{name}.batch_size={config.batch_size}: write a multiple of the {devices} devices here{parts}"
        )


def _is_sound(metrics: steps.Metrics) -> bool:
    """Whether the last step's gradients were finite. Waits for them."""
    return int(metrics["skipped_in_a_row"]) == 0


def _check_skipped(name: str, step: int, metrics: steps.Metrics | None, config: StageConfig) -> None:
    """Waits for the step; UserError if it was the last straw. The newest checkpoint is from before them."""
    if metrics is None or (skipped := int(metrics["skipped_in_a_row"])) < config.max_skipped:
        return
    raise UserError(
        f"{name}: stopped at step {step}, where the gradients were not finite for the {skipped}. time in a "
        f"row; the checkpoint from before stays: try a lower {name}.optim.learning_rate, a longer "
        f"warmup_steps, or compute_dtype=float32"
    )
