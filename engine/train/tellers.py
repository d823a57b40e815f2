"""Scenes of the drawn world, told by several processes: an accelerator draws faster than one can tell.

One core tells and lays out 5,000 scenes a second; one H100 trains the U-Net of configs/scenes.py on 6,400.
What is drawn does not depend on the number of processes.
"""

import concurrent.futures
import functools
import itertools
import multiprocessing
import signal
from typing import Any

import jax
import numpy as np

from engine import world
from engine.types import UserError
from engine.world.drawing import composed, laid_out


class Tellers:
    """Processes that tell scenes for this one, which draws them. They start with the first batch."""

    def __init__(self, processes: int):
        self._processes = processes

    @functools.cached_property
    def _pool(self) -> concurrent.futures.ProcessPoolExecutor:
        # Forked, they would inherit the locks of JAX's threads.
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(self._processes, context, _leave_signals)

    def batch(
        self, seed: int, first_index: int, n: int, size: int, easy: float = 0.0
    ) -> tuple[Any, list[str], list[world.Scene]]:
        """As `world.batch`, but that the pictures stay on the device, and are not waited for.

        Raises:
          UserError: one of the processes was killed; and as `world.batch`.
        """
        bounds = np.linspace(0, n, min(self._processes, n) + 1).astype(int)
        try:
            tasks = [
                self._pool.submit(laid_out, seed, first_index + int(a), int(b - a), easy)
                for a, b in itertools.pairwise(bounds)
            ]
            told = [task.result() for task in tasks]
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "one of the processes that tell the scenes was killed: write a lower data.tellers"
            ) from None
        layouts = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(each.layouts for each in told))
        captions = [caption for each in told for caption in each.captions]
        return composed(layouts, size), captions, [scene for each in told for scene in each.scenes]


def _leave_signals() -> None:
    """Ctrl-C goes to the whole group; the training itself says when it is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
