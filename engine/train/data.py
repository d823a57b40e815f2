"""Batches of the drawn world, addressed by step: the position of the data is the step itself."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from engine import world
from engine.text.tokenizer import Tokenizer
from engine.types import UserError
from engine.world.drawing import laid_out
from engine.world.tellers import drawn

Batch = dict[str, np.ndarray | jax.Array]
BatchAt = Callable[[int], Batch]  # the batch of a step, a pure function


def own_rows(batch_size: int, process: int, processes: int) -> tuple[int, int]:
    """The first row of a batch that one of several hosts makes, and how many. UserError if they differ."""
    if batch_size % processes:
        raise UserError(f"batch_size={batch_size}: write a multiple of the {processes} processes")
    share = batch_size // processes
    return process * share, share


def pictures(
    seed: int, batch_size: int, size: int, process: int = 0, processes: int = 1, tellers: int = 0
) -> BatchAt:
    """{"image": uint8 (B / processes, size, size, 3)}

    Args:
      batch_size: of all hosts together.
      process, processes: each host makes its part of the batch, see `own_rows`; so in all that follows.
      tellers: see `drawn`; so in `captioned_pictures`.
    """
    rows = own_rows(batch_size, process, processes)
    return drawn(functools.partial(_layouts, seed, batch_size, *rows), size, tellers)


def _layouts(seed: int, batch_size: int, first: int, share: int, step: int) -> dict[str, Any]:
    return {"layouts": laid_out(seed, step * batch_size + first, share).layouts}


def captioned_pictures(
    seed: int,
    batch_size: int,
    size: int,
    tokenizer: Tokenizer,
    easy: float = 0.0,
    easy_steps: int = 0,
    keep_tags: int | None = None,
    process: int = 0,
    processes: int = 1,
    tellers: int = 0,
) -> BatchAt:
    """{"image": uint8 (B / processes, size, size, 3), "ids": int32 (B / processes, L)}

    Args:
      easy, easy_steps: the share of easy scenes (see `sample_scene`), as `easy_share` says.
      keep_tags: None, or captions are `shuffled`.
    """
    captions = _Captioned(
        seed, batch_size, *own_rows(batch_size, process, processes), tokenizer, easy, easy_steps, keep_tags
    )
    return drawn(captions, size, tellers)


@dataclasses.dataclass(frozen=True)
class _Captioned:
    """What a host's rows of each batch show and say."""

    seed: int
    batch_size: int
    first: int
    share: int
    tokenizer: Tokenizer
    easy: float
    easy_steps: int
    keep_tags: int | None

    def __call__(self, step: int) -> dict[str, Any]:
        easily = easy_share(step, self.easy, self.easy_steps)
        told = laid_out(self.seed, step * self.batch_size + self.first, self.share, easily)
        captions = told.captions
        if self.keep_tags is not None:
            captions = shuffled(captions, self.seed, step, self.keep_tags, self.first)
        return {"layouts": told.layouts, "ids": self.tokenizer.encode(captions)}


def easy_share(step: int, easy: float, easy_steps: int) -> float:
    """Of the scenes of a step: `easy` at first, in a line down to none at `easy_steps`."""
    return easy * (1 - step / easy_steps) if step < easy_steps else 0.0


def shuffled(
    captions: Sequence[str], seed: int, step: int, keep_tags: int = 0, first_place: int = 0
) -> list[str]:
    """The comma-separated tags of each caption in an order drawn for (seed, step, place in the batch).

    Args:
      keep_tags: that many first tags keep their places.
      first_place: of the first of these captions in the whole batch.
    """

    def shuffle(caption: str, place: int) -> str:
        tags = [tag.strip() for tag in caption.split(",")]
        first, rest = tags[:keep_tags], tags[keep_tags:]
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step, place)))
        return ", ".join([*first, *(rest[i] for i in rng.permutation(len(rest)))])

    return [shuffle(caption, place) for place, caption in enumerate(captions, first_place)]


def captions_with_facts(
    seed: int, batch_size: int, tokenizer: Tokenizer, process: int = 0, processes: int = 1
) -> BatchAt:
    """Captions and what is true of their scenes.

    {"ids": int32 (B / processes, L), "facts": int32 (B / processes, len(FACTS))}
    """
    first, share = own_rows(batch_size, process, processes)

    def batch_at(step: int) -> Batch:
        captions, truths = world.told(seed, step * batch_size + first, share)
        return {"ids": tokenizer.encode(captions), "facts": np.array([*map(world.facts, truths)], np.int32)}

    return batch_at


def batches(batch_at: BatchAt, first_step: int, ahead: int = 2) -> Iterator[Batch]:
    """The batches of first_step, first_step + 1, ..., made by a thread that keeps `ahead` of them ready."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(batch_at, first_step + i) for i in range(ahead)]
        step = first_step + ahead
        try:
            while True:
                yield futures.pop(0).result()
                futures.append(pool.submit(batch_at, step))
                step += 1
        finally:
            for future in futures:
                future.cancel()
