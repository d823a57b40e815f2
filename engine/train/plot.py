"""The loss of a stage as a picture: over the steps, and over the timesteps of the diffusion."""

import json
import os
import pathlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.train.progress import FILE

PARTS = 4  # of the training, each with its curve over the timesteps


def lines_of(workdir: pathlib.Path, stage: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl for a stage, in order; of a stretch that was run twice, the second."""
    found: list[dict[str, Any]] = []
    for text in (workdir / FILE).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a kill
            continue
        if line["stage"] == stage:
            while found and found[-1]["step"] >= line["step"]:
                found.pop()
            found.append(line)
    return found


def loss_plot(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Draws WORKDIR/loss-STAGE.png of what metrics.jsonl tells."""
    lines = lines_of(workdir, stage)
    timed = [line for line in lines if "loss_by_time" in line]
    figure = Figure(figsize=(11 if timed else 5.5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    _over_steps(axes[0], lines, stage)
    if timed:
        _over_time(axes[1], timed)
    path = workdir / f"loss-{stage}.png"
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png", dpi=100)
    os.replace(unfinished, path)
    return path


def _over_steps(axis: Axes, lines: list[dict[str, Any]], stage: str) -> None:
    """Of the last step of each line; where it is known by time, the mean since the line before."""
    losses = [
        np.sum(line["loss_by_time"]) / np.sum(line["count_by_time"]) if "loss_by_time" in line
        else line["loss"]
        for line in lines
    ]  # fmt: skip
    axis.plot([line["step"] for line in lines], losses, marker="." if len(lines) < 50 else None)
    axis.set(xlabel="step", ylabel="loss", title=stage)
    if min(losses) > 0:
        axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")


def _over_time(axis: Axes, lines: list[dict[str, Any]]) -> None:
    """A curve for each part of the training: where the noise is learned already, and where it is not."""
    for part in np.array_split(np.arange(len(lines)), min(PARTS, len(lines))):
        sums, counts = (
            np.sum([lines[i][name] for i in part], 0) for name in ("loss_by_time", "count_by_time")
        )
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        middles = (np.arange(len(means)) + 0.5) / len(means)
        axis.plot(middles, means, marker="o", label=f"to step {lines[part[-1]]['step']}")
    axis.set(xlabel="timestep, from no noise (0) to noise alone (1)", ylabel="loss", title="by timestep")
    axis.legend()
    axis.grid(alpha=0.3)
