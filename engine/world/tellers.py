"""Batches told by several processes, some steps ahead: an accelerator draws faster than one can tell.

One core tells, lays out and tokenizes 2,500 scenes a second; a GPU trains the U-Net of configs/scenes.py on
several times as many. What is told does not depend on the number of processes.
"""

import concurrent.futures
import functools
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from engine.errors import UserError
from engine.world.drawing import composed

T = TypeVar("T")
AHEAD = 2  # batches under way for each process


def drawn(told: Callable[[int], dict[str, Any]], size: int, tellers: int = 0) -> Callable[[int], dict]:
    """The batches of scenes that are told on the host: "layouts" become "image", all else stays.

    Args:
      told: step -> {"layouts": a batch of `Layout`, ...}, a pure function that can be pickled.
      size: pixels a side.
      tellers: processes that call it, ahead of the training; 0: this one alone.
    """
    told_at = Tellers(tellers, told) if tellers else told

    def batch_at(step: int) -> dict[str, Any]:
        rest = dict(told_at(step))
        return {"image": composed(rest.pop("layouts"), size), **rest}  # on the device, not waited for

    return batch_at


class Tellers(Generic[T]):
    """The function `told`, which processes call for this one.

    They start with the first step that is asked for; the steps after it are then told in advance.
    """

    def __init__(self, processes: int, told: Callable[[int], T]):
        """Args:
        told: a pure function of the step that can be pickled.
        """
        self._processes = processes
        self._told = told
        self._under_way: dict[int, concurrent.futures.Future[T]] = {}

    def __call__(self, step: int) -> T:
        """What `told` returns.

        Raises:
          UserError: one of the processes was killed; and what `told` raises.
        """
        soon = range(step, step + AHEAD * self._processes)
        for other in self._under_way.keys() - soon:
            self._under_way.pop(other).cancel()
        try:
            for each in soon:
                if each not in self._under_way:
                    self._under_way[each] = _pool(self._processes).submit(self._told, each)
            return self._under_way[step].result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "one of the processes that tell the scenes was killed: write a lower data.tellers"
            ) from None


@functools.cache
def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    # Forked, they would inherit the locks of JAX's threads.
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, context, _leave_signals)


def _leave_signals() -> None:
    """Ctrl-C goes to the whole group; the training itself says when it is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
