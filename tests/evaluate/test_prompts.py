"""Prompts for measuring say one thing or another, and hold out what training never sees."""

import re

import pytest

from engine import world
from engine.evaluate.prompts import ATTRIBUTES, KINDS, prompts
from engine.types import UserError
from engine.world.phrases import BACKGROUND_WORDS
from engine.world.sampling import combinations, is_held_out
from engine.world.things import INDEX, THINGS


@pytest.mark.parametrize("kind", KINDS)
def test_seen_prompts_hold_nothing_that_is_held_out(kind):
    found = prompts(kind, False, 60, seed=3)
    assert found == prompts(kind, False, 60, seed=3) != prompts(kind, False, 60, seed=4)
    for prompt, scene in found:
        assert not world.held_out(scene)
        for name in scene.things:
            thing = THINGS[INDEX[name]]
            assert any(noun in prompt for noun in (*thing.nouns, *thing.plurals)), prompt
        phrases = [phrase for group in BACKGROUND_WORDS[scene.background] for phrase in group]
        assert any(re.search(rf"\b{phrase}\b", prompt) for phrase in phrases), prompt


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_held_out_prompts_hold_out_what_they_are_about(kind):
    for prompt, scene in prompts(kind, True, 30):
        held = [middle for _, middle, _ in filter(is_held_out, combinations(scene))]
        assert held, prompt
        if kind == "relation":
            assert not {"colour", "count", "style", "time"} & set(held)
        else:
            assert set(held) == {kind}


def test_the_kinds():
    assert all(scene.colours[0] for _, scene in prompts("colour", False, 20))
    assert {scene.count for _, scene in prompts("count", False, 60)} == {2, 3, 4}
    assert all(len(scene.things) == 2 for _, scene in prompts("relation", False, 20))
    assert all(scene.style != "plain" for _, scene in prompts("style", False, 20))
    assert all(scene.colours == (None,) for _, scene in prompts("thing", False, 20))


@pytest.mark.parametrize(("kind", "held_out"), [("size", False), ("thing", True)])
def test_unknown_kinds(kind, held_out):
    with pytest.raises(UserError, match=f"'{kind}': write one of"):
        prompts(kind, held_out, 1)
