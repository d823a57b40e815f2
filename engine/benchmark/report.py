"""What a benchmark found: a table for people, a file for programs, and a plot."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from engine.weights.files import new_file, write_json

Row = Mapping[str, Any]  # column -> number or text; columns that start with "_" are for the file alone


def table(rows: Sequence[Row]) -> str:
    """The rows under their columns, numbers to four digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row if not name.startswith("_")))
    cells = [columns, *([shown(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = [isinstance(next((r[name] for r in rows if name in r), ""), str) for name in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, text, strict=True)
        ).rstrip()
        for line in cells
    )


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def circumstances(argv: Sequence[str]) -> dict[str, Any]:
    """The command, the day, and what it ran on."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", "-m", "launch.benchmark", *argv]),
        "date": datetime.date.today().isoformat(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write(file: str | os.PathLike, argv: Sequence[str], rows: Sequence[Row]) -> None:
    """Everything as JSON; the file appears whole or not at all."""
    found = {**circumstances(argv), "rows": [{k.lstrip("_"): v for k, v in row.items()} for row in rows]}
    with new_file(pathlib.Path(file)) as new:
        write_json(new, found)
