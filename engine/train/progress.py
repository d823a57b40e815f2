"""What one sees of a training: a line now and then, metrics.jsonl, and TensorBoard."""

import json
import pathlib
import time
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from engine import chips, flops
from engine.config import StageConfig
from engine.train.step import Metrics

REPORT_SECONDS = 10.0
FILE, BOARD = "metrics.jsonl", "tensorboard"


class Arithmetic(NamedTuple):
    """Of one step, in FLOP; see `flops.count`."""

    a_device: float
    peak: float | None  # FLOP/s of a device at best; None where that is unknown


class Progress:
    """A line every few seconds on the terminal, in WORKDIR/metrics.jsonl and for TensorBoard.

    Metrics of one number are those of the last step. Those of several are sums over what was drawn, see
    `losses.by_timestep`: they are added up since the line before, and go to the file alone, as lists.
    """

    def __init__(
        self,
        name: str,
        workdir: pathlib.Path,
        first_step: int,
        config: StageConfig,
        arithmetic: Arithmetic | None = None,
        tells: bool = True,
    ):
        """Args:
        first_step: how many are done already.
        arithmetic: None: not known, or not yet.
        tells: of several hosts, one does.
        """
        self._name, self._file, self._config, self._tells = name, workdir / FILE, config, tells
        self.arithmetic = arithmetic
        self._board = None
        if tells:
            from tensorboardX import SummaryWriter  # which takes PyTorch with it, where that is installed

            # What a run wrote after the checkpoint that it goes on from is forgotten.
            folder = str(workdir / BOARD / name)
            self._board = SummaryWriter(folder, purge_step=first_step + 1, flush_secs=10)
        self._step, self._time = first_step, time.monotonic()
        self._first, self._added, self._told, self._sums = first_step + 1, first_step, first_step, {}
        if tells:
            print(f"{name}: {config.steps - first_step} steps to go; the first compiles", flush=True)

    def close(self) -> None:
        if self._board:
            self._board.close()

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds the sums of a step, once; of one that is skipped they are no numbers. Waits for it."""
        if not self._tells or step <= self._added:
            return
        self._added = step
        if step == self._first < self._config.steps:  # most of its time was the compiler's
            self._step, self._time = step, time.monotonic()
        sums = {name: np.asarray(value, np.float64) for name, value in metrics.items() if np.ndim(value)}
        if all(np.isfinite(value).all() for value in sums.values()):
            self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()}

    def report(self, step: int, metrics: Metrics, force: bool = False) -> None:
        """Writes the line of a step, where it is time for one."""
        early = step == self._first or time.monotonic() - self._time < REPORT_SECONDS
        if not self._tells or step == self._told or (early and not force):
            return
        before, since = self._step, self._time
        self.add(step, metrics)  # waits for the device: now only
        values = {name: np.asarray(value).item() for name, value in metrics.items() if not np.ndim(value)}
        rate = (step - before) / (time.monotonic() - since)
        values |= self._speed(rate)
        sums = {name: value.tolist() for name, value in self._sums.items()}
        self._step, self._time, self._told, self._sums = step, time.monotonic(), step, {}
        with self._file.open("a") as f:
            f.write(json.dumps({"stage": self._name, "step": step, **values, **sums}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        print(self._line(step, values, rate), flush=True)

    def picture(self, step: int, path: pathlib.Path) -> None:
        """Shows a picture that was drawn on the way."""
        with Image.open(path) as image:
            self._board.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def _speed(self, rate: float) -> dict[str, float]:
        """Of `rate` steps a second."""
        speed = {"images/s": round(rate * self._config.batch_size, 2)}
        if self.arithmetic is None:
            return speed
        flops_a_second = rate * self.arithmetic.a_device
        speed["TFLOP/s a device"] = float(f"{flops_a_second / 1e12:.4g}")
        if self.arithmetic.peak:
            speed["mfu"] = flops_a_second / self.arithmetic.peak
        return speed

    def _line(self, step: int, values: dict[str, float], rate: float) -> str:
        exact = {"images/s": ".1f", "TFLOP/s a device": ".3g"}
        told = [f"{name} {value:{exact.get(name, '.4f')}}" for name, value in values.items()
                if isinstance(value, float)]  # fmt: skip
        if values.get("skipped"):
            told.append(f"{values['skipped']} skipped")
        left = int((self._config.steps - step) / rate)
        told.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return "  ".join([f"{self._name} {step}/{self._config.steps}", *told])


def arithmetic(step, devices: list[jax.Device], *arguments) -> Arithmetic:
    """Of a training step over all `devices`, from its arguments."""
    return Arithmetic(flops.count(step, *arguments) / len(devices), chips.peak(devices[0]))
