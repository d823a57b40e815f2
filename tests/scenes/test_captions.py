"""Captions say what is true, in words that are known, and grammatically."""

import re

import numpy as np
import pytest

from engine.scenes import BACKGROUNDS, THINGS, Scene, caption, told, vocabulary, words
from engine.scenes.captions import BACKGROUND_WORDS, with_article
from engine.scenes.things import INDEX


@pytest.fixture(scope="module")
def captions():
    return told(1, 0, 20_000)[0]


def test_words_are_exactly_the_words_of_captions(captions):
    assert {word.strip(",") for text in captions for word in text.split()} == words()


def test_vocabulary_is_the_callers_own():
    vocabulary().clear()
    assert vocabulary() == words()


def test_captions_are_tidy(captions):
    for text in captions:
        assert text == text.lower().strip()
        assert not re.search(r"  | ,|,,|,$|\{|\}", text), text


def test_a_and_an(captions):
    articles = [match for text in captions for match in re.findall(r"\b(an?) (\w)", text)]
    assert {article for article, _ in articles} == {"a", "an"}
    assert all((article == "an") == (letter in "aeiou") for article, letter in articles)
    assert with_article("a", "umbrella") == "an umbrella"
    assert with_article("a", "small umbrella") == "a small umbrella"
    assert with_article("a", "sunglasses", plural=True) == "sunglasses"


def test_every_noun_means_one_thing_and_every_phrase_one_background():
    nouns = [noun for thing in THINGS for noun in thing.nouns]
    assert len(nouns) == len(set(nouns))
    phrases = [phrase for both in BACKGROUND_WORDS.values() for phrase in set(sum(both, ()))]
    assert len(phrases) == len(set(phrases))
    assert tuple(BACKGROUND_WORDS) == BACKGROUNDS


def _says(text: str, phrases) -> bool:
    return any(re.search(rf"\b{re.escape(phrase)}\b", text) for phrase in phrases)


def test_a_caption_names_every_thing_and_an_exact_one_the_background():
    rng = np.random.default_rng(3)
    scene = Scene(("car", "tree"), ("big", "small"), "left of", "snow")
    said = set()
    for _ in range(300):
        free, exact = caption(scene, rng), caption(scene, rng, exact=True)
        for name in scene.things:
            assert _says(free, THINGS[INDEX[name]].nouns) and _says(exact, THINGS[INDEX[name]].nouns)
        assert _says(exact, [phrase for group in BACKGROUND_WORDS["snow"] for phrase in group])
        assert not _says(exact, {"big", "small"})
        assert _says(exact, {"left", "right"})
        said.add(free)
    assert len(said) > 250


def test_left_and_right_are_never_confused():
    """Whatever the wording, what it puts on the left is the first thing."""
    rng = np.random.default_rng(4)
    scene = Scene(("star", "key"), ("big", "big"), "left of", "sky")
    sides = {"left": 0, "right": 0}
    for _ in range(300):
        text = caption(scene, rng, exact=True)
        star_first = text.index("star") < text.index("key")
        if " on the left" in text and " on the right" in text:
            assert re.search("star on the left,? (and )?.*key on the right", text)
            continue
        side = "left" if "left" in text else "right"
        assert star_first == (side == "left"), text
        sides[side] += 1
    assert min(sides.values()) > 50
