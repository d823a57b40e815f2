"""Energy, where the platform counts it: RAPL of a machine's processors, NVML of NVIDIA's GPUs.

TPUs do not tell. RAPL is of whole processors, whatever else they do meanwhile, and Linux may show it to the
administrator alone.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

POWERCAP = pathlib.Path("/sys/class/powercap")


class Counter(NamedTuple):
    """Joules since some time, and after how many of them it begins again."""

    read: Callable[[], float]
    around: float = math.inf


def joules(call: Callable[[], Any], rounds: int, counters: Sequence[Counter]) -> float | None:
    """What a call takes, as the mean of some; None where nothing counts it. Waits for what it computes."""
    if not counters:
        return None
    before = [counter.read() for counter in counters]
    for _ in range(rounds):
        call()
    after = [counter.read() for counter in counters]
    spent = zip(counters, before, after, strict=True)
    return sum((b - a) % counter.around for counter, a, b in spent) / rounds


def counters(platform: str, numbers: Sequence[int], folder: pathlib.Path = POWERCAP) -> list[Counter]:
    """Those of a platform's devices of these numbers; none where it has none that can be read."""
    if platform == "cpu":
        return _of_processors(folder)
    return _of_gpus(numbers) if platform == "gpu" else []


def _of_processors(folder: pathlib.Path) -> list[Counter]:
    found = []
    for package in sorted(folder.glob("intel-rapl:*")):  # AMD's are called so, too
        if package.name.count(":") > 1:
            continue  # a part of one of the others
        with contextlib.suppress(OSError, ValueError):
            if (package / "name").read_text().strip() == "psys":
                continue  # the whole machine, others included
            file, around = package / "energy_uj", int((package / "max_energy_range_uj").read_text()) / 1e6
            read = lambda file=file: int(file.read_text()) / 1e6  # noqa: E731
            read()
            found.append(Counter(read, around))
    return found


def _of_gpus(numbers: Sequence[int]) -> list[Counter]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handles = [_handle(pynvml, number) for number in numbers]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # older than Volta, or no driver
        return []
    total = pynvml.nvmlDeviceGetTotalEnergyConsumption
    return [Counter(lambda handle=handle: total(handle) / 1e3) for handle in handles]


def _handle(pynvml: Any, number: int) -> Any:
    """Of a GPU that CUDA counts so, among those that it was told to see."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = told.split(",")[number].strip() if told else str(number)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)
