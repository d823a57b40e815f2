"""Chooses scenes at random, and which combinations no training ever sees.

About one in ten combinations is held out, by a hash of its words alone, so that every machine and every
later version agrees. A combination is

    (thing, "colour", colour)   painted in a colour that it does not have anyway
    (thing, "count", n)         2 to 4 of it
    (thing, "time", time)       at another time than by day
    (thing, "style", style)     in another style than the plain one
    (thing, relation, thing)    where relations that look alike are one: riding is "on", who is under
                                something has it "above", and "beside" knows no order

A thing's own colour is no combination: an apple is red whenever nobody paints it.

Three sentences are promised to be new to the model. A scene has two things, so that "a red fox wearing
sunglasses on a skateboard" is never told as a whole; of its parts, a red fox, a fox that wears sunglasses
and a fox on a skateboard are all held out. "An astronaut riding a horse" is one combination. Of "a scarlet
auto at sunset" both are held out: the red car and the car at sunset.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from engine.world.scene import BACKGROUNDS, COLOURS, OUTDOORS, PLACES, RELATIONS, STYLES, TIMES, Scene, Thing
from engine.world.things import HATTED, INDEX, THINGS

Combination = tuple[str, str, str]

HELD_OUT_SHARE = 10  # one in so many
SALT = "fogsculpt world 1"  # part of every hash: another one holds out others, and old models have seen them
NAMED: frozenset[Combination] = frozenset(
    {
        ("fox", "colour", "red"),
        ("fox", "wearing", "sunglasses"),
        ("fox", "on", "skateboard"),
        ("astronaut", "on", "horse"),
        ("car", "colour", "red"),
        ("car", "time", "sunset"),
    }
)

COUNTABLE = tuple(thing for thing in THINGS if thing.plurals)
WEARERS = tuple(thing for thing in THINGS if thing.eyes)
HOLDERS = tuple(thing for thing in THINGS if thing.hand)
RIDERS = tuple(thing for thing in THINGS if thing.rides)
CARRIERS = tuple(thing for thing in THINGS if thing.carries)
HELD = tuple(thing for thing in THINGS if thing.held)
WORN = tuple(thing for thing in THINGS if thing.worn)
GLASSES = tuple(thing for thing in WORN if thing.worn == "eyes")
SEATS = (*CARRIERS, *(THINGS[INDEX[name]] for name in ("bed", "sofa", "chair")))
ROOFS = tuple(
    THINGS[INDEX[name]] for name in ("umbrella", "tree", "palm tree", "cloud", "rainbow", "mushroom")
)

# How often: the kinds of scenes, and the relations of those with two things.
ONE, COUNTED = 0.40, 0.15  # the rest: two
RELATION_SHARES = (0.17, 0.13, 0.16, 0.08, 0.14, 0.12, 0.10, 0.10)  # in the order of RELATIONS
COUNT_SHARES = (0.40, 0.35, 0.25)  # of 2, 3, 4
PAINTED = 0.38  # of the things that may be
STYLED = 0.40
TIMED = 0.45  # of the outdoor backgrounds
BIG = 0.65


def pick(rng: np.random.Generator, options: Sequence):
    """One of a sequence, uniformly. `Generator.choice` is 20 times slower."""
    return options[int(rng.random() * len(options))]


def combinations(scene: Scene) -> list[Combination]:
    """What the scene combines, as the rule of the held-out ones sees it."""
    found: list[Combination] = []
    for name, colour in zip(scene.things, scene.colours, strict=True):
        if colour is not None and colour not in THINGS[INDEX[name]].true_colours:
            found.append((name, "colour", colour))
        if scene.time != "day":
            found.append((name, "time", scene.time))
        if scene.style != "plain":
            found.append((name, "style", scene.style))
    if scene.count > 1:
        found.append((scene.things[0], "count", str(scene.count)))
    if scene.relation is not None:
        found.append(related(*scene.things, scene.relation))
    return found


def related(first: str, second: str, relation: str) -> Combination:
    """The combination of two things in a relation; relations that look alike give the same."""
    if relation in ("left of", "next to"):
        first, second = sorted((first, second))
        return first, "beside", second
    if relation == "under":
        return second, "above", first
    return first, {"riding": "on"}.get(relation, relation), second


@functools.cache
def is_held_out(combination: Combination) -> bool:
    """Whether no training sees the combination: the named ones, and one in ten by hash."""
    digest = hashlib.sha256("|".join((SALT, *combination)).encode()).digest()
    return combination in NAMED or int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def held_out(scene: Scene) -> bool:
    """Whether the scene contains a combination that no training sees."""
    return any(map(is_held_out, combinations(scene)))


def sample_scene(rng: np.random.Generator, easy: float = 0.0, held_out: bool = False) -> Scene:
    """A random scene: 40 % show one thing, 15 % two to four of a kind, 45 % two in a relation.

    Args:
      easy: the share of scenes that show one big unpainted thing in the middle, plainly and by day, to
        begin a training with.
      held_out: draws only scenes with at least one combination that is held out, for measuring; else
        only scenes with none, for training.

    Raises:
      ValueError: easy scenes are asked for among the held-out ones; they combine nothing.
    """
    if held_out and easy > 0:
        raise ValueError(f"easy={easy} of held-out scenes: an easy scene combines nothing, use easy=0")
    if easy > 0 and rng.random() < easy:
        return Scene(
            (pick(rng, THINGS).name,),
            (None,),
            ("big",),
            1,
            "middle",
            None,
            pick(rng, BACKGROUNDS),
            "day",
            "plain",
        )
    # What kind of scene is settled first: rejecting must not shift the shares.
    kind = rng.random()
    if kind < ONE:
        draw = _one
    elif kind < ONE + COUNTED:
        draw = functools.partial(_several, count=2 + _which(rng, COUNT_SHARES))
    else:
        draw = functools.partial(_two, relation=RELATIONS[_which(rng, RELATION_SHARES)])
    while True:
        scene = draw(rng)
        if any(map(is_held_out, combinations(scene))) == held_out:
            return scene


def _which(rng: np.random.Generator, shares: Sequence[float]) -> int:
    """An index, as often as its share says."""
    draw, upto = rng.random() * sum(shares), itertools.accumulate(shares)
    return min(sum(draw >= limit for limit in upto), len(shares) - 1)


def _one(rng: np.random.Generator) -> Scene:
    thing = pick(rng, THINGS)
    place = "middle" if rng.random() < 0.5 else pick(rng, PLACES[1:])
    return Scene((thing.name,), (_colour(rng, thing),), (_size(rng),), 1, place, None, *_surroundings(rng))


def _several(rng: np.random.Generator, count: int) -> Scene:
    thing = pick(rng, COUNTABLE)
    return Scene((thing.name,), (_colour(rng, thing),), (_size(rng),), count, None, None, *_surroundings(rng))


def _two(rng: np.random.Generator, relation: str) -> Scene:
    first, second = _pair(rng, relation)
    # What is worn or held has its wearer's size: nothing to choose.
    fixed = relation in ("wearing", "holding")
    return Scene(
        (first.name, second.name),
        (_colour(rng, first), _colour(rng, second)),
        (_size(rng), "small" if fixed else _size(rng)),
        1,
        None,
        relation,
        *_surroundings(rng),
    )


def _pair(rng: np.random.Generator, relation: str) -> tuple[Thing, Thing]:
    """Two different things of which the relation makes sense."""
    firsts = {"riding": RIDERS, "wearing": WEARERS, "holding": HOLDERS}.get(relation, THINGS)
    first = pick(rng, firsts)
    match relation:
        case "riding":
            seconds = CARRIERS
        case "wearing":
            seconds = GLASSES if first.name in HATTED else WORN
        case "holding":
            seconds = HELD
        case "on":
            seconds = SEATS if rng.random() < 0.4 else THINGS
        case "under":
            seconds = ROOFS if rng.random() < 0.5 else THINGS
        case _:
            seconds = THINGS
    while (second := pick(rng, seconds)) is first:
        pass
    return first, second


def _colour(rng: np.random.Generator, thing: Thing) -> str | None:
    return pick(rng, COLOURS) if thing.paints and rng.random() < PAINTED else None


def _size(rng: np.random.Generator) -> str:
    return "big" if rng.random() < BIG else "small"


def _surroundings(rng: np.random.Generator) -> tuple[str, str, str]:
    """Background, time, style."""
    background = pick(rng, BACKGROUNDS)
    timed = background in OUTDOORS and rng.random() < TIMED
    style = pick(rng, STYLES[1:]) if rng.random() < STYLED else "plain"
    return background, pick(rng, TIMES[1:]) if timed else "day", style
