"""How well a model of the drawn world follows its prompts, and how like renders its pictures look."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from engine import world
from engine.evaluate import frechet, reader
from engine.evaluate.answers import Facts, marks, shares, truth
from engine.evaluate.prompts import ATTRIBUTES, KINDS, prompts
from engine.pipeline import Pipeline
from engine.types import Params

RENDER_SEED = 2**33  # of the renders that pictures are held against


class Drawn(NamedTuple):
    """A group of pictures, with what was asked for and what the probe reads."""

    kind: str
    held_out: bool
    prompts: list[str]
    scenes: list[world.Scene]
    images: UInt8[np.ndarray, "B S S 3"]
    reading: reader.Reading

    @property
    def facts(self) -> Facts:
        return marks(self.reading.answers, self.scenes)

    @property
    def sureness(self) -> Float[np.ndarray, " B"]:
        """The probe's mean log-probability of the right answers, in nats."""
        right = truth(self.scenes)._asdict()
        rows = np.arange(len(self.scenes))
        return np.mean([self.reading.log_probs[name][rows, answer] for name, answer in right.items()], 0)


def groups() -> Iterator[tuple[str, bool]]:
    """All kinds of prompts: of seen combinations, then of those held out."""
    yield from ((kind, False) for kind in KINDS)
    yield from ((kind, True) for kind in ATTRIBUTES)


def draw(
    pipe: Pipeline,
    probe: Params,
    kind: str,
    held_out: bool,
    n: int,
    seed: int = 0,
    batch_size: int = 16,
    report: Callable[[int], None] = lambda done: None,
    **how: Any,
) -> Drawn:
    """Draws `n` prompts of a kind and reads the pictures.

    Args:
      seed: of prompts and pictures both.
      batch_size: pictures that a device draws at once.
      report: called with how many pictures a batch has added.
      how: of `Pipeline.generate`: steps, sampler, guidance_scale.
    """
    texts, scenes = map(list, zip(*prompts(kind, held_out, n, seed), strict=True))
    images = []
    for first in range(0, n, batch_size):
        part = texts[first : first + batch_size]
        images.append(pipe.generate(part, seed=seed, first_index=first, batch_size=batch_size, **how))
        report(len(part))
    pictures = np.concatenate(images)
    return Drawn(kind, held_out, texts, scenes, pictures, reader.read(probe, pictures))


Table = dict[str, dict[str, float]]


def table(drawn: Sequence[Drawn]) -> Table:
    """Shares of right facts by group: {"colour": {"things": 0.97, ...}, "colour, held out": ...}."""
    return {each.kind + ", held out" * each.held_out: shares(each.facts) for each in drawn}


class Likeness(NamedTuple):
    """How the pictures compare with renders of their scenes.

    Attributes:
      pictures: the Fréchet distance (Heusel et al. 2017) to renders, in the probe's features, of all groups
        together.
      renders: that of other renders of the same scenes: what a perfect model would score with so few.
      table: what `table` would say of renders: the probe's own mistakes.
    """

    pictures: float
    renders: float
    table: Table


def likeness(probe: Params, drawn: Sequence[Drawn]) -> Likeness:
    """How like renders the pictures look, and how well the probe reads those."""
    size = drawn[0].images.shape[1]
    theirs, others = ([_rendered(probe, each.scenes, size, number) for each in drawn] for number in (0, 1))
    ours, *rendered = (
        frechet.moments_of(reading.features for reading in readings)
        for readings in ([each.reading for each in drawn], theirs, others)
    )
    return Likeness(
        *(frechet.frechet_distance(moments, rendered[0]) for moments in (ours, rendered[1])),
        table([each._replace(reading=reading) for each, reading in zip(drawn, theirs, strict=True)]),
    )


def _rendered(probe: Params, scenes: Sequence[world.Scene], size: int, number: int) -> reader.Reading:
    """What the probe reads from renders of scenes, each with random numbers of its own."""
    parts = []
    for start in range(0, len(scenes), reader.BATCH_SIZE):
        part = scenes[start : start + reader.BATCH_SIZE]
        keys = ([RENDER_SEED + number, start + i] for i in range(len(part)))
        rngs = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        parts.append(reader.read(probe, world.draw(part, rngs, size)[0]))
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)
