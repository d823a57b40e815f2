"""Time against what changes: batch size, pixels, steps or devices."""

import os
import pathlib
from collections.abc import Sequence

from engine.benchmark.report import Row
from engine.types import UserError
from engine.weights.files import new_file

CHANGES = ("batch", "pixels", "steps", "devices")
RATE = "images/s"


def plot(file: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Seconds an image, of ours and of each peer, against the first of CHANGES of which there are several.

    Whatever else changes gives a line of its own. The file, a .png, appears whole or not at all.

    Raises:
      UserError: nothing changes, there are no times, or matplotlib is not installed.
    """
    varied = [name for name in CHANGES if len({row.get(name) for row in rows}) > 1]
    if not varied or any(RATE not in row for row in rows):
        raise UserError("plot: nothing changes; write several batch_sizes, sides, steps or devices")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot: pip install matplotlib") from None
    across, *others = varied
    if "what" in rows[0]:
        others.append("what")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for rate in [name for name in rows[0] if name.endswith(RATE)]:
        for rest in dict.fromkeys(tuple(row[name] for name in others) for row in rows):
            chosen = [row for row in rows if tuple(row[name] for name in others) == rest]
            label = [rate.removesuffix(RATE).strip() or "ours"]
            told = zip(others, rest, strict=True)
            label += [str(value) if name == "what" else f"{name} {value}" for name, value in told]
            xs, ys = [row[across] for row in chosen], [1 / row[rate] for row in chosen]
            axes.plot(xs, ys, marker="o", label=", ".join(label))
    axes.set(xlabel=across, ylabel="seconds an image", ylim=(0, None))
    axes.legend()
    with new_file(pathlib.Path(file)) as new:
        figure.savefig(new, format="png", dpi=120)
