"""Times of things that are done again and again, one beside the other."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

_compiled: list[float] = []  # seconds of each program


def _note(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_note)


class First(NamedTuple):
    """Of the first call."""

    seconds: float  # all of it
    compiling: float  # in XLA, the sum over its programs, some of which it compiles at the same time


def first_call(call: Callable[[], Any]) -> First:
    """Calls what has not been compiled yet, and waits for it."""
    before, start = len(_compiled), time.perf_counter()
    call()
    return First(time.perf_counter() - start, sum(_compiled[before:]))


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
