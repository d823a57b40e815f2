"""Pictures of several shapes in batches of one shape each, in an order that is a function of the step.

Shapes, as in NovelAI's training of Stable Diffusion (2022): about equal areas, so that all batches take about
the same memory and time, and aspect ratios from tall to wide, so that little of a picture is cropped.

Order. A bucket is the pictures of one shape. Each bucket is shuffled anew in every round and the rounds are
joined to an endless row, from which batches of B are cut: nothing is left over at the end of a round. In the
first e epochs a bucket of n pictures gives floor(e n / B) batches; so an epoch's number of batches, their
buckets (shuffled too) and the place of each batch in its bucket's row follow from the step alone. Nothing has
to be saved and nothing replayed: a resumed run sees what the uninterrupted one would have seen.

Why not Grain: its pipelines batch what each host has on its own, so the hosts of one step would come to
different shapes; and what it would spare us here is a permutation and a pool of threads.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from engine.types import UserError

PLAN, ROUND = 0, 1  # what is drawn, in seeds


class Shape(NamedTuple):
    width: int
    height: int


def shapes(size: int, count: int, multiple: int = 64, max_aspect: float = 2.0) -> list[Shape]:
    """At most `count` shapes of about size * size pixels, from 1:max_aspect to max_aspect:1.

    Their aspect ratios are spread evenly on a logarithmic scale; their sides are rounded to multiples.
    """
    if count == 1:
        return [Shape(size, size)]
    if size % multiple:
        raise UserError(f"pictures of {size} pixels: write data.multiple={math.gcd(size, 64)}")
    aspects = np.geomspace(1 / max_aspect, max_aspect, count)
    sides = [(size * aspect**0.5, size / aspect**0.5) for aspect in aspects.tolist()]
    rounded = [Shape(*(max(1, round(side / multiple)) * multiple for side in pair)) for pair in sides]
    return list(dict.fromkeys(rounded))


def nearest_shape(width: int, height: int, among: list[Shape]) -> int:
    """The place of the shape whose aspect ratio is nearest, as a factor."""
    apart = [abs(math.log(width / height) - math.log(s.width / s.height)) for s in among]
    return apart.index(min(apart))


class Order:
    """Which pictures a step sees: a pure function of (which bucket each picture is in, batch size, seed)."""

    def __init__(self, bucket_of: np.ndarray, batch_size: int, seed: int):
        """Args:
        bucket_of: the bucket of each picture, from 0.
        """
        self._buckets = [np.flatnonzero(bucket_of == b) for b in range(int(bucket_of.max()) + 1)]
        self._counts = [len(bucket) for bucket in self._buckets]
        self._all, self._batch, self._seed = len(bucket_of), batch_size, seed
        self._plan = functools.lru_cache(2)(self._draw_plan)
        self._round = functools.lru_cache(3 * len(self._buckets))(self._draw_round)

    def batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step's batch, and the place of its first picture in the bucket's row."""
        epoch = self.epoch(step)
        place = step - self.first_step(epoch)
        plan = self._plan(epoch)
        bucket = int(plan[place])
        batch = epoch * self._counts[bucket] // self._batch + np.count_nonzero(plan[:place] == bucket)
        return bucket, int(batch) * self._batch

    def picture(self, bucket: int, place: int) -> tuple[int, int]:
        """The picture at a place in a bucket's row, and the round that it belongs to."""
        round, place = divmod(place, self._counts[bucket])
        return int(self._round(bucket, round)[place]), round

    def pictures(self, bucket: int) -> np.ndarray:
        """All of a bucket, in the order in which they were given."""
        return self._buckets[bucket]

    def count(self, bucket: int) -> int:
        return self._counts[bucket]

    def epoch(self, step: int) -> int:
        epoch = step * self._batch // self._all  # or a later one: first_step rounds down
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def first_step(self, epoch: int) -> int:
        return sum(epoch * n // self._batch for n in self._counts)

    def _draw_plan(self, epoch: int) -> np.ndarray:
        batches = [(epoch + 1) * n // self._batch - epoch * n // self._batch for n in self._counts]
        plan = np.repeat(np.arange(len(batches), dtype=np.int32), batches)
        return np.random.default_rng([self._seed, PLAN, epoch]).permutation(plan)

    def _draw_round(self, bucket: int, round: int) -> np.ndarray:
        return np.random.default_rng([self._seed, ROUND, bucket, round]).permutation(self._buckets[bucket])
