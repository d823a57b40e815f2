"""Captions as people write them: synonyms, varied order, details left out; some as lists of keywords.

A caption states only what is true of its scene. Every phrase stands in a table of `phrases` or belongs to
a thing, so that `words()` is exact.
"""

import functools
import itertools
from collections.abc import Iterable

import numpy as np

from engine.world import phrases
from engine.world.sampling import pick, sample_scene
from engine.world.scene import OUTDOORS, Scene, Thing
from engine.world.things import COLOUR_WORDS, INDEX, THINGS

# How often a caption says what it may leave out.
KEYWORDS = 0.15  # of the captions are lists of keywords
PAINT_STATED = 0.88
OWN_COLOUR_STATED = 0.22  # an apple is red without saying so
SIZE_STATED = {"small": 0.7, "big": 0.25}  # unsaid means big more often than not
BACKGROUND_STATED = 0.85
TIME_STATED = {"day": 0.06, "sunset": 0.88, "night": 0.88, "rain": 0.88}
STYLE_STATED = 0.88
PLACE_STATED = {"middle": 0.25, "left": 0.85, "right": 0.85, "top": 0.85, "bottom": 0.85}
COUNT_STATED = 0.88  # exactly; else "several"
RELATION_STATED = 0.80  # in words that mean no other
# A thing's first noun is the usual one.
NAMED = 0.45

_SOUNDS_LIKE_YOU = ("uni", "ufo")  # "a unicorn"


def caption(scene: Scene, rng: np.random.Generator, exact: bool = False) -> str:
    """One of the many captions of the scene, in lower case.

    An `exact` one is no list of keywords. It states background, place, count, relation, paint, a time
    other than day and a style other than plain, in words that mean only these; it says nothing of sizes
    nor of colours that go without saying. That is what an evaluation can check.
    """
    if not exact and rng.random() < KEYWORDS:
        return _keywords(scene, rng)
    subject = _subject(scene, rng, exact)
    opening, style_after, style_name = _style(scene, rng, exact, bool(phrases.FINITE & set(subject.split())))
    tail = [_place(scene, rng, exact), *_where_and_when(scene, rng, exact)]
    head = ""
    # What stands before the subject: "at night, a fox in the forest".
    if not opening and tail[-1] and rng.random() < 0.12:
        head = tail.pop() + ", "
    text = head + _join(opening, subject, *tail)
    if style_after:
        text = _join(text, style_after) if rng.random() < 0.5 else f"{text}, {style_after}"
    if style_name:
        text = f"{style_name}, {text}" if rng.random() < 0.4 else f"{text}, {style_name}"
    return text


def _subject(scene: Scene, rng: np.random.Generator, exact: bool) -> str:
    """'a red fox riding the bike', 'three pears', 'a small car'."""
    nouns = [_noun_phrase(scene, which, rng, exact) for which in range(len(scene.things))]
    if len(nouns) == 1:
        return nouns[0]
    return _relation(scene, rng, exact).format(*nouns)


def _relation(scene: Scene, rng: np.random.Generator, exact: bool) -> str:
    """The template that says how the first thing stands to the second."""
    relation, (first, second) = scene.relation, scene.things
    if not exact and rng.random() >= RELATION_STATED:
        return pick(rng, phrases.VAGUE_RELATIONS[relation])
    options = phrases.RELATION_WORDS[relation]
    if relation == "riding" and second in phrases.RIDING_WORDS and rng.random() < 0.35:
        options = phrases.RIDING_WORDS[second]
    if not THINGS[INDEX[first]].rides:  # whoever rides lives, or nearly so: an apple only lies there
        options = [option for option in options if "stand" not in option]
    return pick(rng, options)


def _noun_phrase(scene: Scene, which: int, rng: np.random.Generator, exact: bool, bare: bool = False) -> str:
    """Article or count, size, colour, noun: 'a small red car', 'three foxes', 'sunglasses'.

    `bare`: without an article.
    """
    thing, size, count = THINGS[INDEX[scene.things[which]]], scene.sizes[which], scene.count
    colour, size_word = _colour(scene, which, rng, exact), ""
    # The second of these is as large as the first one's head or hand: no size to state.
    sized = not exact and not (which == 1 and scene.relation in ("wearing", "holding"))
    if sized and rng.random() < SIZE_STATED[size]:
        size_word = pick(rng, phrases.SIZE_WORDS[size])
    noun = _noun(thing, count, rng)
    painted = scene.colours[which] is not None and colour and rng.random() < 0.08
    if painted:
        phrase = _join(size_word, pick(rng, phrases.PAINTED).format(noun, colour))
    else:
        phrase = _join(size_word, colour, noun)
    if count > 1:
        return _join(_count(count, rng, exact), phrase)
    if bare:
        return phrase
    if thing.pair and thing.kind != "food" and rng.random() < 0.2:
        return _join(phrases.PAIR_OF, phrase)
    return with_article(pick(rng, phrases.ARTICLES), phrase, thing.pair)


def _noun(thing: Thing, count: int, rng: np.random.Generator) -> str:
    nouns = thing.plurals if count > 1 else thing.nouns
    return nouns[0] if rng.random() < NAMED else pick(rng, nouns)


def _colour(scene: Scene, which: int, rng: np.random.Generator, exact: bool) -> str:
    """A word for the thing's paint, or for a colour that it has anyway; '' to leave it unsaid."""
    colour, own = scene.colours[which], THINGS[INDEX[scene.things[which]]].true_colours
    if colour is None and not exact and own and rng.random() < OWN_COLOUR_STATED:
        return pick(rng, COLOUR_WORDS[pick(rng, own)])
    if colour is not None and (exact or rng.random() < PAINT_STATED):
        # The plain word is the usual one.
        return colour if rng.random() < 0.5 else pick(rng, COLOUR_WORDS[colour])
    return ""


def _count(count: int, rng: np.random.Generator, exact: bool) -> str:
    if exact:
        return phrases.EXACT_COUNTS[count]
    return pick(rng, (phrases.COUNT_WORDS if rng.random() < COUNT_STATED else phrases.VAGUE_COUNTS)[count])


def with_article(article: str, phrase: str, pair: bool = False) -> str:
    """`phrase` after 'a' ('an' before a vowel's sound), 'the', 'one' or ''; a pair has no 'a' or 'one'."""
    if pair and article in ("a", "one"):
        return phrase
    if article == "a" and phrase[0] in "aeiou" and not phrase.startswith(_SOUNDS_LIKE_YOU):
        article = "an"
    return _join(article, phrase)


def _place(scene: Scene, rng: np.random.Generator, exact: bool) -> str:
    if scene.place is None or not (exact or rng.random() < PLACE_STATED[scene.place]):
        return ""
    return pick(rng, phrases.PLACE_WORDS[scene.place])


def _where_and_when(scene: Scene, rng: np.random.Generator, exact: bool) -> list[str]:
    """Background and time, in either order, '' for what is left unsaid; what is said comes last."""
    said = []
    if exact or rng.random() < BACKGROUND_STATED:
        said.append(pick(rng, phrases.BACKGROUND_WORDS[scene.background][0]))
    if _timed(scene, rng, exact):
        said.append(pick(rng, phrases.TIME_WORDS[scene.time][0]))
    return said[:: pick(rng, (1, 1, -1))] or [""]


def _timed(scene: Scene, rng: np.random.Generator, exact: bool) -> bool:
    """Whether the time is said. Indoors there is none; by day it mostly goes without saying."""
    if exact or scene.background not in OUTDOORS:
        return scene.time != "day"
    return rng.random() < TIME_STATED[scene.time]


def _style(scene: Scene, rng: np.random.Generator, exact: bool, whole: bool) -> tuple[str, str, str]:
    """Opening, phrase behind everything, name for a comma: at most one of them states the style.

    `whole`: the subject is a whole sentence, which no opening fits.
    """
    if scene.style == "plain" or not (exact or rng.random() < STYLE_STATED):
        return ("" if whole or rng.random() < 0.75 else pick(rng, phrases.OPENINGS)), "", ""
    openings, after, names = phrases.STYLE_WORDS[scene.style]
    draw = rng.random()
    if draw < 0.45 and not whole:
        return pick(rng, openings), "", ""
    return ("", pick(rng, after), "") if draw < 0.75 else ("", "", pick(rng, names))


def _keywords(scene: Scene, rng: np.random.Generator) -> str:
    """A list: 'red fox, sunset, watercolour, big'. The subject comes first more often than not."""
    nouns = [_noun_phrase(scene, which, rng, False, bare=True) for which in range(len(scene.things))]
    if len(nouns) == 2 and rng.random() < 0.75:
        nouns = [_relation(scene, rng, False).format(*nouns)]
    tags = []
    if scene.place is not None and rng.random() < 0.6 * PLACE_STATED[scene.place]:
        tags.append(pick(rng, phrases.PLACE_NAMES[scene.place]))
    if rng.random() < BACKGROUND_STATED:
        tags.append(pick(rng, phrases.BACKGROUND_WORDS[scene.background][1]))
    if _timed(scene, rng, False):
        tags.append(pick(rng, phrases.TIME_WORDS[scene.time][1]))
    if scene.style != "plain" and rng.random() < STYLE_STATED:
        tags.append(pick(rng, phrases.STYLE_WORDS[scene.style][2]))
    rng.shuffle(tags)
    return ", ".join(nouns + tags if rng.random() < 0.8 else tags + nouns)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def tell(
    seed: int, index: int, easy: float = 0.0, held_out: bool = False
) -> tuple[str, Scene, np.random.Generator]:
    """Caption and truth number `index` of `seed`, and the generator, which goes on to draw the picture.

    `easy` and `held_out` as in `sample_scene`.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    scene = sample_scene(rng, easy, held_out)
    return caption(scene, rng), scene, rng


def told(
    seed: int, first_index: int, n: int, easy: float = 0.0, held_out: bool = False
) -> tuple[list[str], list[Scene]]:
    """Captions and truths first_index .. first_index + n - 1, without drawing them."""
    captions, scenes, _ = zip(*(tell(seed, first_index + i, easy, held_out) for i in range(n)), strict=True)
    return list(captions), list(scenes)


def retold(seed: int, first_index: int, n: int, easy: float, again: int) -> list[str]:
    """Captions of the same scenes as those of `told`, in other words for each `again` from 1; 0: the same."""
    captions, scenes = told(seed, first_index, n, easy)
    if again == 0:
        return captions
    keys = ([seed, first_index + i] for i in range(n))
    rngs = (np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, again])) for key in keys)
    return [caption(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]


@functools.cache
def words() -> frozenset[str]:
    """Every word that a caption can contain, and no other."""
    surroundings = itertools.chain(*phrases.BACKGROUND_WORDS.values(), *phrases.TIME_WORDS.values())
    every = itertools.chain(
        *(phrases.ARTICLES, ("an", phrases.PAIR_OF), phrases.OPENINGS, phrases.PAINTED),
        *phrases.COUNT_WORDS.values(),
        *phrases.VAGUE_COUNTS.values(),
        *phrases.SIZE_WORDS.values(),
        *(*phrases.PLACE_WORDS.values(), *phrases.PLACE_NAMES.values()),
        *(*phrases.RELATION_WORDS.values(), *phrases.VAGUE_RELATIONS.values()),
        *phrases.RIDING_WORDS.values(),
        *COLOUR_WORDS.values(),
        *itertools.chain(surroundings, *phrases.STYLE_WORDS.values()),
        *(thing.nouns + thing.plurals for thing in THINGS),
    )
    return frozenset(_split(every))


def _split(every: Iterable[str]) -> set[str]:
    bare = (word.strip(",") for phrase in every for word in phrase.split())
    return {word for word in bare if word and "{" not in word}
