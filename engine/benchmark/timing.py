"""Times of things that are done again and again, one beside the other."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

_compiled: list[tuple[float, float]] = []  # when each program's compilation began and ended


def _note(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        now = time.perf_counter()
        _compiled.append((now - seconds, now))


jax.monitoring.register_event_duration_secs_listener(_note)


class First(NamedTuple):
    """Of the first call."""

    seconds: float  # all of it
    compiling: float  # of these, those in which XLA compiled something


def first_call(call: Callable[[], Any]) -> First:
    """Calls what has not been compiled yet, and waits for it."""
    before, start = len(_compiled), time.perf_counter()
    call()
    return First(time.perf_counter() - start, _covered(_compiled[before:]))


def _covered(stretches: Sequence[tuple[float, float]]) -> float:
    """Seconds in some of these stretches, which may overlap."""
    seconds, until = 0.0, -math.inf
    for start, end in sorted(stretches):
        seconds += max(0.0, end - max(start, until))
        until = max(until, end)
    return seconds


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round: A B A B, so that what slows the machine down slows down both.

    Each was called before, so that nothing is compiled here, and waits for what it computes.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return found


class Ratio(NamedTuple):
    """How many times as fast, round by round."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def ratio(slow: list[float], fast: list[float]) -> Ratio:
    """Of the seconds of two calls `in_turn`."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))
