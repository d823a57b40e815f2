"""What a picture is asked, and which answers count."""

import dataclasses

import numpy as np
import pytest

from engine import world
from engine.evaluate.answers import (
    ARRANGEMENTS,
    NO_COLOUR,
    NO_THING,
    QUESTIONS,
    Answers,
    exchanged,
    marks,
    shares,
    truth,
)
from engine.world.scene import COLOURS, Scene
from engine.world.things import INDEX

PAIR = Scene(("fox", "cat"), ("blue", None), ("big", "big"), 1, None, "left of", "sky", "day", "plain")
LONE = Scene(("fox",), ("blue",), ("big",), 1, "left", None, "sky", "night", "neon")
THREE = Scene(("apple",), (None,), ("big",), 3, None, None, "kitchen", "day", "plain")
SHELTERED = dataclasses.replace(PAIR, relation="under")
YELLOW = COLOURS.index("yellow")  # the cat's own colour
NEAR = dataclasses.replace(PAIR, relation="next to")


def marked(scene, **changes):
    answers = truth([scene])._replace(**{name: np.array([value]) for name, value in changes.items()})
    return {name: mark[0] for name, mark in marks(answers, [scene]).items() if not np.isnan(mark[0])}


def test_the_truth():
    one = {name: int(column[0]) for name, column in truth([PAIR])._asdict().items()}
    assert (one["first"], one["second"]) == (INDEX["fox"], INDEX["cat"])
    assert (one["first_colour"], one["second_colour"]) == (COLOURS.index("blue"), YELLOW)
    assert (one["count"], ARRANGEMENTS[one["arrangement"]]) == (0, "beside")
    three = truth([THREE])
    assert (three.second[0], three.count[0]) == (NO_THING, 2)
    assert three.first_colour[0] == COLOURS.index("red")  # an apple's own
    assert ARRANGEMENTS[three.arrangement[0]] == "several"
    assert (
        truth([dataclasses.replace(LONE, things=("rainbow",), colours=(None,))]).first_colour[0] == NO_COLOUR
    )


def test_every_answer_has_its_number():
    _, scenes = world.told(5, 0, 500)
    for name, column in truth(scenes)._asdict().items():
        assert column.min() >= 0 and column.max() < QUESTIONS[name], name


def test_what_is_under_comes_second():
    one = truth([SHELTERED])
    assert (one.first[0], one.second[0]) == (INDEX["cat"], INDEX["fox"])
    assert (one.first_colour[0], one.second_colour[0]) == (YELLOW, COLOURS.index("blue"))
    assert ARRANGEMENTS[one.arrangement[0]] == "above"


def test_of_two_next_to_each_other_the_left_one_comes_first():
    rngs = [np.random.default_rng(i) for i in range(20)]
    _, layouts = world.draw([NEAR] * 20, rngs, 32)
    turned = exchanged([NEAR] * 20, layouts)
    assert 0 < turned.sum() < 20
    seen = truth([NEAR] * 20, layouts).first
    np.testing.assert_array_equal(seen, np.where(turned, INDEX["cat"], INDEX["fox"]))
    assert not exchanged([PAIR] * 20, layouts).any()  # there the sentence says it


@pytest.mark.parametrize("scene", [PAIR, LONE, THREE, SHELTERED, NEAR])
def test_the_truth_is_right_in_all_that_is_asked(scene):
    asked = marked(scene)
    assert set(asked.values()) == {1.0}
    assert ("colour" in asked) == any(scene.colours)
    assert ("count" in asked) == (scene.count > 1)
    assert ("relation" in asked) == (scene.relation is not None)
    assert ("place" in asked) == (scene.place is not None)


def turned_round(scene):
    one = truth([scene])
    names = ("first", "second", "first_colour", "second_colour")
    return dict(
        zip(names, (one.second[0], one.first[0], one.second_colour[0], one.first_colour[0]), strict=True)
    )


@pytest.mark.parametrize("scene", [PAIR, SHELTERED])
def test_exchanged_things_keep_their_colours_but_not_their_relation(scene):
    asked = marked(scene, **turned_round(scene))
    assert (asked["things"], asked["colour"], asked["relation"], asked["all"]) == (1, 1, 0, 0)


def test_next_to_knows_no_order():
    assert set(marked(NEAR, **turned_round(NEAR)).values()) == {1.0}


def test_a_colour_on_the_wrong_thing_is_wrong():
    asked = marked(PAIR, first_colour=NO_COLOUR, second_colour=COLOURS.index("blue"))
    assert (asked["things"], asked["colour"], asked["relation"]) == (1, 0, 1)


def test_missing_and_additional_things():
    assert marked(PAIR, second=NO_THING)["things"] == 0
    assert marked(LONE, second=INDEX["cat"])["things"] == 0
    assert marked(PAIR, first=INDEX["cat"], second=INDEX["cat"])["things"] == 0


def test_a_colour_that_is_not_asked_is_free():
    assert marked(PAIR, second_colour=COLOURS.index("red"))["all"] == 1


@pytest.mark.parametrize(
    ("fact", "changes"),
    [
        ("count", {"count": 3}),
        ("background", {"background": 0}),
        ("time", {"time": 2}),
        ("style", {"style": 3}),
    ],
)
def test_one_wrong_fact(fact, changes):
    asked = marked(THREE, **changes)
    assert {name for name, mark in asked.items() if not mark} == {fact, "all"}


def test_of_two_paints_each_counts_half():
    both = dataclasses.replace(PAIR, colours=("blue", "red"))
    asked = marked(both, second_colour=COLOURS.index("pink"))
    assert (asked["colour"], asked["all"]) == (0.5, 0)


def test_shares_are_of_those_that_were_asked():
    scenes = [PAIR, LONE, THREE, THREE]
    right = truth(scenes)
    count = right.count.copy()
    count[2] = 0
    found = shares(marks(right._replace(count=count), scenes))
    assert (found["count"], found["relation"], found["things"], found["all"]) == (0.5, 1, 1, 0.75)
    assert "count" not in shares(marks(truth([PAIR]), [PAIR]))


def test_as_many_answers_as_scenes():
    with pytest.raises(ValueError, match="1 answers for 2"):
        marks(Answers(*truth([PAIR])), [PAIR, LONE])
