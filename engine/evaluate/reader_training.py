"""Trains the probe of the drawn world on fresh renders, resumably.

python -m launch.probe --workdir runs/probe
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, Num, UInt8

from engine import world
from engine.config import OptimConfig, StageConfig
from engine.evaluate import reader
from engine.evaluate.answers import Answers, exchanged, truth
from engine.evaluate.reader import CELLS, SIZE
from engine.types import Params
from engine.world.drawing import composed, sprites
from engine.world.layout import Layout, layouts
from engine.world.tellers import drawn

SEED = 2**32 + 1  # scenes of its own: neither a model's training nor an evaluation draws them
TEST_SEED = 2**32 + 2
FURTHER_SEED = SEED + 2**34  # for a probe that has learned before
HELD_OUT_EVERY = 5  # one render in so many has a combination that is held out
WHERE = 1.0  # weight of the maps in the loss


def stage(steps: int, further: bool = False) -> StageConfig:
    """How to train; `further`: a probe that has learned before."""
    rate, flat = (1e-3, 0) if further else (2e-3, steps // 3)
    return StageConfig(
        steps=steps,
        batch_size=64,
        ema=(0.998,),
        checkpoint_every=250,
        optim=OptimConfig(
            learning_rate=rate, warmup_steps=200, decay_steps=max(steps - flat, 1), weight_decay=1e-3
        ),
    )


class Renders(NamedTuple):
    images: UInt8[np.ndarray, "B S S 3"]
    scenes: list[world.Scene]
    answers: Answers
    where: Float[np.ndarray, "B 2 T"]  # over the cells: where each thing is, sums to 1; zeros for none


def renders(seed: int, first_index: int, n: int) -> Renders:
    """Renders first_index .. first_index + n - 1 of `seed`, with the truth about them."""
    scenes, laid, answers, where = told(seed, first_index, n)
    return Renders(np.asarray(composed(laid, SIZE)), scenes, answers, where)


def told(seed: int, first_index: int, n: int) -> tuple[list[world.Scene], Layout, Answers, np.ndarray]:
    """The same renders before they are drawn: scenes, layouts, the truth, and the places."""
    numbers = range(first_index, first_index + n)
    all_told = [world.tell(seed, i, held_out=i % HELD_OUT_EVERY == 0) for i in numbers]
    scenes, rngs = [scene for _, scene, _ in all_told], [rng for *_, rng in all_told]
    laid = layouts(scenes, sprites(), rngs)
    return scenes, laid, truth(scenes, laid), places(scenes, laid)


def places(scenes: list[world.Scene], layouts: Layout) -> Float[np.ndarray, "B 2 T"]:
    """A Gaussian over the cells, one cell wide, around the middle of each sprite; in the order of `truth`."""
    cells = np.arange(CELLS) + 0.5
    x, y = np.moveaxis(layouts.centre * CELLS, -1, 0)  # (B, sprites)
    distance = np.square(cells - x[..., None])[:, :, None] + np.square(cells - y[..., None])[..., None]
    spots = np.exp(-0.5 * distance).reshape(len(x), -1, 1, CELLS**2)
    spots /= spots.sum(-1, keepdims=True)
    is_of = layouts.thing[..., None] == np.arange(2)  # (B, sprites, things)
    found = (spots * is_of[..., None]).sum(1) / np.maximum(is_of.sum(1), 1)[..., None]
    return np.where(exchanged(scenes, layouts)[:, None, None], found[:, ::-1], found).astype(np.float32)


def batches(batch_size: int, seed: int = SEED, tellers: int = 0) -> Callable[[int], dict[str, Any]]:
    """step -> {"image", "where", and the answer to each question}; tellers: see `drawn`"""
    return drawn(functools.partial(_told_at, seed, batch_size), SIZE, tellers)


def _told_at(seed: int, batch_size: int, step: int) -> dict[str, Any]:
    _, laid, answers, where = told(seed, step * batch_size, batch_size)
    return {"layouts": laid, "where": where, **answers._asdict()}


def loss(params: Params, frozen: None, batch: dict[str, Array], key: Key[Array, ""]):
    """The sum of all questions' cross-entropies, and of the maps' with the true places."""
    read = reader.apply(params, soften(batch["image"], key))
    entropies = {
        name: optax.softmax_cross_entropy_with_integer_labels(logits, batch[name]).mean()
        for name, logits in read.answers.items()
    }
    right = {name: (logits.argmax(-1) == batch[name]).mean() for name, logits in read.answers.items()}
    maps = optax.softmax_cross_entropy(read.where, batch["where"]).mean()
    told = {name: right[name] for name in ("first", "second", "first_colour", "count", "arrangement")}
    return sum(entropies.values()) + WHERE * maps, told


def soften(images: Num[Array, "B S S 3"], key: Key[Array, ""]) -> Float[Array, "B S S 3"]:
    """Blurs, dulls and roughens each picture by amounts of its own, as a decoder may."""
    b, size = images.shape[:2]
    keys = jax.random.split(key, 4)
    blur, dull, rough = (jax.random.uniform(k, (b, 1, 1, 1)) for k in keys[:3])
    x = images.astype(jnp.float32)
    half = x.reshape(b, size // 2, 2, size // 2, 2, 3).mean((2, 4))
    quarter = half.reshape(b, size // 4, 2, size // 4, 2, 3).mean((2, 4))
    blurred = [jax.image.resize(small, x.shape, "linear") for small in (half, quarter)]
    x = x + jnp.clip(2.2 * blur - 0.6, 0, 1) * (blurred[0] - x)
    x = x + jnp.clip(2.0 * blur - 1.4, 0, 1) * (blurred[1] - x)
    x = 127.5 + (x - 127.5) * (0.85 + 0.3 * dull)
    return x + 14 * rough**2 * jax.random.normal(keys[3], x.shape)


@functools.cache
def test_renders(n: int) -> Renders:
    """Renders that no training has seen."""
    parts = [renders(TEST_SEED, start, min(50, n - start)) for start in range(0, n, 50)]
    columns = zip(*parts, strict=True)
    images, scenes, answers, where = columns
    return Renders(
        np.concatenate(images),
        [scene for part in scenes for scene in part],
        Answers(*map(np.concatenate, zip(*answers, strict=True))),
        np.concatenate(where),
    )


def accuracy(params: Params, n: int = 2000) -> dict[str, float]:
    """Share of right answers to each question, over `n` renders that no training has seen."""
    drawn = test_renders(n)
    read = reader.read(params, drawn.images).answers
    right = map(np.equal, drawn.answers, read)
    return {name: float(value.mean()) for name, value in zip(Answers._fields, right, strict=True)}
