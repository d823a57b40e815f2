"""What can be asked about a picture of the drawn world, and when an answer is right.

A picture shows less than a caption says: who rides on something is on it, a fox under a tree has the tree
above it, and of two things beside each other nobody sees which was named first. So the first thing is the
left one, the upper one, the one that wears or holds; and only what can be seen is asked.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from engine.world.facts import shown_colour
from engine.world.layout import Layout
from engine.world.scene import BACKGROUNDS, COLOURS, MOST, PLACES, STYLES, TIMES, Scene
from engine.world.things import INDEX, THINGS

_SEEN_AS = {"left of": "beside", "next to": "beside", "under": "above", "riding": "on"}  # the others: as said
ARRANGEMENTS = (*PLACES, "several", "beside", "above", "on", "wearing", "holding")
NO_THING, NO_COLOUR = len(THINGS), len(COLOURS)  # answers


class Answers(NamedTuple):
    """One answer a picture: indices in THINGS, COLOURS, ARRANGEMENTS and so on; NO_THING, NO_COLOUR."""

    first: Int[np.ndarray, " B"]
    second: Int[np.ndarray, " B"]
    first_colour: Int[np.ndarray, " B"]  # NO_COLOUR: it is of several, as it is in nature
    second_colour: Int[np.ndarray, " B"]
    count: Int[np.ndarray, " B"]  # answer 0 is one
    arrangement: Int[np.ndarray, " B"]
    background: Int[np.ndarray, " B"]
    time: Int[np.ndarray, " B"]
    style: Int[np.ndarray, " B"]


QUESTIONS = {  # the fields of Answers, and how many answers each has
    "first": len(THINGS) + 1,
    "second": len(THINGS) + 1,
    "first_colour": len(COLOURS) + 1,
    "second_colour": len(COLOURS) + 1,
    "count": MOST,
    "arrangement": len(ARRANGEMENTS),
    "background": len(BACKGROUNDS),
    "time": len(TIMES),
    "style": len(STYLES),
}


def exchanged(scenes: Sequence[Scene], layouts: Layout | None = None) -> Bool[np.ndarray, " B"]:
    """Whether the thing that a scene names second is the first to be seen.

    Args:
      layouts: where the things are drawn; without it, of two next to each other the first named comes first.
    """
    under = np.array([scene.relation == "under" for scene in scenes])
    if layouts is None:
        return under
    across = np.where(layouts.thing == 1, layouts.centre[..., 0], np.inf).min(1)
    left = across < np.where(layouts.thing == 0, layouts.centre[..., 0], np.inf).min(1)
    return under | (left & [scene.relation == "next to" for scene in scenes])


def truth(scenes: Sequence[Scene], layouts: Layout | None = None) -> Answers:
    """The right answers; `layouts` as in `exchanged`."""
    rows = zip(scenes, exchanged(scenes, layouts).tolist(), strict=True)
    return Answers(*np.array([_of_one(*row) for row in rows], np.int32).T)


def _of_one(scene: Scene, turned: bool) -> tuple[int, ...]:
    things = [INDEX[name] for name in scene.things]
    colours = [shown_colour(scene, which) for which in range(len(things))]
    painted = [NO_COLOUR if colour is None else COLOURS.index(colour) for colour in colours]
    if turned:
        things, painted = things[::-1], painted[::-1]
    arrangement = scene.relation or scene.place or "several"
    return (
        *(*things, NO_THING)[:2],
        *(*painted, NO_COLOUR)[:2],
        scene.count - 1,
        ARRANGEMENTS.index(_SEEN_AS.get(arrangement, arrangement)),
        BACKGROUNDS.index(scene.background),
        TIMES.index(scene.time),
        STYLES.index(scene.style),
    )


Facts = dict[str, Float[np.ndarray, " B"]]  # for each picture 1 right, 0 wrong, nan: not asked


def marks(answers: Answers, scenes: Sequence[Scene]) -> Facts:
    """Which stated facts the answers confirm.

    Returns:
      things: exactly the right ones, whichever stands where.
      colour: the share of the painted things that have their paint; of two things, each is found by what
        it is, where one of them is right.
      count: of several of a kind.
      relation: of two things; where both are right, they have not changed places.
      place: of a single thing.
      background, time, style.
      all: 1 where all of these that are asked are 1.
    """
    right = truth(scenes)
    if len(right.first) != len(answers.first):
        raise ValueError(f"{len(answers.first)} answers for {len(right.first)} scenes")
    things, crossed = _matched(answers, right)
    seen = np.stack([answers.first_colour, answers.second_colour])
    seen = np.where(crossed, seen[::-1], seen)
    painted = [[colour is not None for colour in (*scene.colours, None)[:2]] for scene in scenes]
    asked = np.where(exchanged(scenes)[:, None], np.flip(painted, 1), painted).T
    hits = (seen == np.stack([right.first_colour, right.second_colour])) & asked
    two = np.array([scene.relation is not None for scene in scenes])
    undirected = np.array([scene.relation == "next to" for scene in scenes])
    arranged = (answers.arrangement == right.arrangement) & (~crossed | undirected)
    several = np.array([scene.count > 1 for scene in scenes])
    facts = {
        "things": things.astype(float),
        "colour": _where(asked.any(0), hits.sum(0) / np.maximum(asked.sum(0), 1)),
        "count": _where(several, answers.count == right.count),
        "relation": _where(two, arranged),
        "place": _where(~two & ~several, arranged),
        "background": (answers.background == right.background).astype(float),
        "time": (answers.time == right.time).astype(float),
        "style": (answers.style == right.style).astype(float),
    }
    facts["all"] = np.nanmin(np.stack(list(facts.values())), 0).astype(int).astype(float)
    return facts


def _matched(answers: Answers, right: Answers) -> tuple[Bool[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
    """Whether the things are the right ones; and whether they are found more often in each other's place."""
    straight = np.int32(answers.first == right.first) + (answers.second == right.second)
    crossing = np.int32(answers.first == right.second) + (answers.second == right.first)
    return np.maximum(straight, crossing) == 2, (crossing > straight) & (right.second != NO_THING)


def _where(asked: Bool[np.ndarray, " B"], value: np.ndarray) -> Float[np.ndarray, " B"]:
    return np.where(asked, value.astype(float), np.nan)


def shares(facts: Facts) -> dict[str, float]:
    """The mean of each fact over the pictures that were asked it; without those that none was asked."""
    return {name: float(np.nanmean(marks)) for name, marks in facts.items() if not np.isnan(marks).all()}
