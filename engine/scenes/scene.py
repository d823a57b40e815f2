"""What is in a picture, before it is drawn or told: the structured truth."""

import dataclasses
from typing import NamedTuple

import numpy as np

from engine.scenes.backgrounds import BACKGROUNDS
from engine.scenes.things import INDEX, THINGS

SIZES = ("small", "big")
PLACES = ("middle", "left", "right", "top", "bottom")
# First thing <relation> second thing. The inverse words ("right of", "below") are a matter of captions.
RELATIONS = ("left of", "above", "on", "wearing")
ARRANGEMENTS = PLACES + RELATIONS

WEARERS = tuple(i for i, thing in enumerate(THINGS) if thing.eyes)
WORN = tuple(i for i, thing in enumerate(THINGS) if thing.worn)
CARRIERS = tuple(i for i, thing in enumerate(THINGS) if thing.carries)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two things before a background. All that a caption may state, and nothing else.

    Attributes:
      things: the names of one or two different things.
      sizes: 'small' or 'big' for each.
      arrangement: where the one thing is (one of PLACES), or how the first of two stands to the second
        (one of RELATIONS).
      background: a name from BACKGROUNDS.
    """

    things: tuple[str, ...]
    sizes: tuple[str, ...]
    arrangement: str
    background: str

    def __post_init__(self):
        allowed = PLACES if len(self.things) == 1 else RELATIONS
        if len(self.things) not in (1, 2) or len(set(self.things)) != len(self.things):
            raise ValueError(f"a scene has one thing or two different ones, not {self.things}")
        if unknown := [name for name in self.things if name not in INDEX]:
            raise ValueError(f"unknown thing {unknown[0]!r}")
        if len(self.sizes) != len(self.things) or not set(self.sizes) <= set(SIZES):
            raise ValueError(f"sizes {self.sizes} do not fit {self.things}; allowed: {SIZES}")
        if self.arrangement not in allowed:
            raise ValueError(f"arrangement {self.arrangement!r} of {self.things}: allowed are {allowed}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}")


class Labels(NamedTuple):
    """A scene as indices: into THINGS (second: -1 if there is none), BACKGROUNDS, ARRANGEMENTS."""

    first: int
    second: int
    background: int
    arrangement: int


def labels(scene: Scene) -> Labels:
    first, second = (*(INDEX[name] for name in scene.things), -1)[:2]
    background, arrangement = BACKGROUNDS.index(scene.background), ARRANGEMENTS.index(scene.arrangement)
    return Labels(first, second, background, arrangement)


# What a caption is asked about its scene, and how many answers there are to each question.
SPOTS = (*PLACES, "underneath")
FACTS: dict[str, int] = {
    **dict.fromkeys(SPOTS, len(THINGS) + 1),  # what is there; the last answer: nothing
    "background": len(BACKGROUNDS),
    "arrangement": len(ARRANGEMENTS),
    "first size": len(SIZES),
    "second size": len(SIZES) + 1,  # the last: there is no second
}
_SPOTS_OF = {  # of the first thing and the second
    "left of": ("left", "right"),
    "above": ("top", "bottom"),
    "on": ("middle", "underneath"),
    "wearing": ("middle", "top"),
}


def facts(scene: Scene) -> tuple[int, ...]:
    """The scene as the answers to the questions of FACTS, in their order."""
    spots = _SPOTS_OF.get(scene.arrangement, (scene.arrangement,))
    there = {spot: INDEX[name] for spot, name in zip(spots, scene.things, strict=True)}
    known = labels(scene)
    sizes = [SIZES.index(size) for size in scene.sizes]
    return (
        *(there.get(spot, len(THINGS)) for spot in SPOTS),
        known.background,
        known.arrangement,
        *(sizes if len(sizes) == 2 else (*sizes, len(SIZES))),
    )


def pick(rng: np.random.Generator, options):
    """One of a sequence, uniformly. `Generator.choice` is 20 times slower."""
    return options[int(rng.random() * len(options))]


def sample_scene(rng: np.random.Generator, easy: float = 0.0) -> Scene:
    """A random scene: 45 % show one thing, 55 % two, of those 40 % one on the other.

    Args:
      easy: the share of scenes that show one big thing in the middle instead, to begin a training with.
    """
    is_easy = easy > 0 and rng.random() < easy
    background = pick(rng, BACKGROUNDS)
    if is_easy:
        return Scene((pick(rng, THINGS).name,), ("big",), "middle", background)
    if rng.random() < 0.45:
        place = "middle" if rng.random() < 0.5 else pick(rng, PLACES[1:])
        return Scene((pick(rng, THINGS).name,), (_size(rng),), place, background)
    draw = rng.random()
    if draw < 0.40:
        relation = "on"
        first = int(rng.random() * len(THINGS))
        second = _other(rng, first, CARRIERS if rng.random() < 0.4 else range(len(THINGS)))
    elif draw < 0.50:
        relation, first, second = "wearing", pick(rng, WEARERS), pick(rng, WORN)
    else:
        relation = "above" if draw < 0.70 else "left of"
        first = int(rng.random() * len(THINGS))
        second = _other(rng, first, range(len(THINGS)))
    # What is worn has the size of its wearer's head: nothing to choose.
    sizes = (_size(rng), "small" if relation == "wearing" else _size(rng))
    return Scene((THINGS[first].name, THINGS[second].name), sizes, relation, background)


def _size(rng: np.random.Generator) -> str:
    return "big" if rng.random() < 0.65 else "small"


def _other(rng: np.random.Generator, first: int, options) -> int:
    return pick(rng, [index for index in options if index != first])
