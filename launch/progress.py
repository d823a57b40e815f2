"""How far a run is: a bar where a person watches, a line a batch elsewhere."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from launch.cli import stop_if_asked, tell

BAR = "{percentage:3.0f}%|{bar}| {postfix[0]} [{elapsed}, {remaining} left, {rate_noinv_fmt}]"


class Progress:
    """Call `step` with each number of sampling steps that a batch has gone on."""

    def __init__(self, batches: Sequence[int], steps: Sequence[int]):
        """Args:
        batches: how many pictures are made at once, on all devices together, one batch after another.
        steps: of each of them.
        """
        self.batches, self.steps, self.images = batches, steps, sum(batches)
        self._batch = self._done = 0  # the one that is being drawn, and how many of its steps are done
        self._batch_began = time.monotonic()
        self._bar = tqdm(
            total=self.images,
            unit=" images",
            bar_format=BAR,
            postfix=["compiling"],
            dynamic_ncols=True,
            disable=None,  # where stderr is no terminal
            file=sys.stderr,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, count: int) -> None:
        """`count` more steps of the batch that is being drawn. Here the program also stops, if asked to."""
        stop_if_asked()
        self._done += count
        batch, steps = self._batch, self.steps[self._batch]
        images = self.batches[batch]
        if not self._bar.disable:
            self._bar.postfix[0] = f"batch {batch + 1}/{len(self.batches)}, step {self._done}/{steps}"
            # fractions of pictures; rounding must not lead beyond the whole
            self._bar.update(min(images * count / steps, self.images - self._bar.n))
        elif self._done == steps:
            self._tell(batch, images)
        if self._done == steps:
            self._batch, self._done = batch + 1, 0

    def _tell(self, batch: int, images: int) -> None:
        now = time.monotonic()
        rate = images / max(now - self._batch_began, 1e-9)
        drawn = sum(self.batches[: batch + 1])
        left = f", {(self.images - drawn) / rate:.0f} s left" if drawn < self.images else ""
        where = f"batch {batch + 1}/{len(self.batches)}: {drawn}/{self.images} images"
        tell(f"{where}, {rate:.2g} images/s{left}")
        self._batch_began = now
