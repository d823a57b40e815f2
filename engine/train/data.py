"""Batches of drawn scenes, addressed by step: the position of the data is the step itself."""

import concurrent.futures
from collections.abc import Iterator

import numpy as np

from engine import scenes
from engine.text.tokenizer import Tokenizer


def scene_batch(
    seed: int, step: int, batch_size: int, size: int, tokenizer: Tokenizer | None
) -> dict[str, np.ndarray]:
    """{"image": uint8 (B, size, size, 3)} and, with a tokenizer, "ids": int32 (B, L)."""
    images, captions, _ = scenes.batch(seed, step * batch_size, batch_size, size)
    if tokenizer is None:
        return {"image": images}
    return {"image": images, "ids": tokenizer.encode(captions)}


def scene_batches(
    seed: int, first_step: int, batch_size: int, size: int, tokenizer: Tokenizer | None = None, ahead: int = 2
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of first_step, first_step + 1, ..., drawn by a thread that keeps `ahead` of them ready."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def draw(step: int):
            return pool.submit(scene_batch, seed, step, batch_size, size, tokenizer)

        futures = [draw(first_step + i) for i in range(ahead)]
        step = first_step + ahead
        try:
            while True:
                yield futures.pop(0).result()
                futures.append(draw(step))
                step += 1
        finally:
            for future in futures:
                future.cancel()
