"""What a model of the drawn world saw in training that is nearest to what it draws: does it copy?"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from engine import world
from engine.evaluate import reader
from engine.types import Params

AT_ONCE = 50  # scenes drawn together


class Neighbour(NamedTuple):
    """A picture of the training, its caption, and how far its features are."""

    image: UInt8[np.ndarray, "S S 3"]
    caption: str
    distance: float


def nearest(
    probe: Params,
    images: UInt8[np.ndarray, "B S S 3"],
    scenes: Sequence[world.Scene],
    seed: int,
    numbers: Iterable[int],
    count: int = 3,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Neighbour]]:
    """For each picture the `count` nearest of a training's pictures `numbers`, the nearest first.

    Distances are those of the probe's features, each in units of its deviation over the training's pictures.
    Compared is what shows one of the things that the pictures show; the rest is far away, and drawing it
    would take hours.

    Args:
      scenes: what the pictures were to show.
      seed: of the training's scenes, which were drawn with easy=0.
      report: called with how many of the training's pictures have been looked at, and of how many.
    """
    size = images.shape[1]
    wanted = set().union(*(scene.things for scene in scenes))
    alike = [number for number in numbers if wanted & set(world.tell(seed, number)[1].things)]
    theirs, done = [], 0
    for part in _parts(alike):
        theirs.append(reader.read(probe, _draw(seed, part, size)).features)
        done += len(part)
        report(done, len(alike))
    if not theirs:
        return [[] for _ in images]
    features, spread = _scaled(np.concatenate(theirs))
    ours = reader.read(probe, images).features / spread
    chosen = [np.argsort(np.linalg.norm(features - one, axis=1))[:count] for one in ours]
    pictures = {i: _draw(seed, [alike[i]], size)[0] for i in sorted({int(i) for i in np.concatenate(chosen)})}
    return [
        [
            Neighbour(
                pictures[int(i)], world.tell(seed, alike[i])[0], float(np.linalg.norm(features[i] - one))
            )
            for i in order
        ]
        for one, order in zip(ours, chosen, strict=True)
    ]


def _parts(numbers: list[int]) -> Iterable[list[int]]:
    return (numbers[start : start + AT_ONCE] for start in range(0, len(numbers), AT_ONCE))


def _scaled(features: Float[np.ndarray, "N F"]) -> tuple[np.ndarray, np.ndarray]:
    spread = features.std(0) + 1e-6
    return features / spread, spread


def _draw(seed: int, numbers: list[int], size: int) -> UInt8[np.ndarray, "N S S 3"]:
    """Pictures of those numbers, drawn `AT_ONCE` at a time, so that one program does for all."""
    padded = (numbers * AT_ONCE)[:AT_ONCE] if len(numbers) < AT_ONCE else numbers
    told = [world.tell(seed, number) for number in padded]
    return world.draw([scene for _, scene, _ in told], [rng for *_, rng in told], size)[0][: len(numbers)]
