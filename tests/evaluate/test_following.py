"""Prompts state facts, and the score counts them."""

import re

import numpy as np
import pytest

from engine import scenes
from engine.evaluate.following import prompts_for_evaluation, score
from engine.evaluate.probe import NONE, Answers, truth
from engine.scenes.captions import BACKGROUND_WORDS
from engine.scenes.things import INDEX
from engine.types import UserError


@pytest.mark.parametrize(("kind", "count"), [("single", 1), ("two", 2)])
def test_prompts_state_every_fact_that_is_checked(kind, count):
    prompts = prompts_for_evaluation(kind, 100, seed=4)
    assert prompts == prompts_for_evaluation(kind, 100, seed=4)
    assert prompts != prompts_for_evaluation(kind, 100, seed=5)
    assert len({scene.arrangement for _, scene in prompts}) >= 4
    for prompt, scene in prompts:
        assert len(scene.things) == count
        for name in scene.things:
            assert any(noun in prompt for noun in scenes.THINGS[INDEX[name]].nouns), prompt
        phrases = [phrase for group in BACKGROUND_WORDS[scene.background] for phrase in group]
        assert any(re.search(rf"\b{phrase}\b", prompt) for phrase in phrases), prompt


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="single or two"):
        prompts_for_evaluation("three", 1)


SCENE = scenes.Scene(("fox", "cat"), ("big", "big"), "left of", "sky")
LONE = scenes.Scene(("fox",), ("big",), "left", "sky")


def _scored(scene, **changes):
    answers = truth([scene])._replace(**{name: np.array([value]) for name, value in changes.items()})
    return score(Answers(*answers), [scene])


def test_what_is_right_scores():
    assert _scored(SCENE) == {"things": 1, "background": 1, "arrangement": 1, "all": 1}
    assert _scored(LONE) == {"things": 1, "background": 1, "arrangement": 1, "all": 1}


def test_exchanged_things_are_the_right_ones_in_the_wrong_places():
    shares = _scored(SCENE, first=INDEX["cat"], second=INDEX["fox"])
    assert shares == {"things": 1, "background": 1, "arrangement": 0, "all": 0}


def test_a_missing_or_an_additional_thing_is_wrong():
    assert _scored(SCENE, second=NONE)["things"] == 0
    assert _scored(LONE, second=INDEX["cat"]) == {"things": 0, "background": 1, "arrangement": 1, "all": 0}


def test_shares_are_means_over_pictures():
    drawn = [SCENE, LONE, SCENE, LONE]
    right = truth(drawn)
    night = scenes.BACKGROUNDS.index("night")
    background = right.background.copy()
    background[0] = night
    shares = score(right._replace(background=background), drawn)
    assert shares == {"things": 1, "background": 0.75, "arrangement": 1, "all": 0.75}


def test_as_many_answers_as_scenes():
    with pytest.raises(ValueError, match="1 answers for 2"):
        score(truth([SCENE]), [SCENE, LONE])
