"""Captions as people write them: synonyms, varied order, details left out.

A caption states only what is true of its scene. Every phrase stands in a table of this file or of
`things`, so that `words()` is exact.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from engine.scenes.scene import Scene, pick, sample_scene
from engine.scenes.things import INDEX, THINGS, Thing

SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
SIZE_STATED = {"small": 0.7, "big": 0.25}  # unsaid means big more often than not
COLOUR_STATED = 0.3
BACKGROUND_STATED = 0.88
PLACE_STATED = {"middle": 0.3}  # of the rest, PLACE_STATED_ELSE
PLACE_STATED_ELSE = 0.85

ARTICLES = ("a",) * 7 + ("the", "", "")
OPENINGS = ("",) * 16 + (
    "a picture of",
    "picture of",
    "a drawing of",
    "an image of",
    "a photo of",
    "a painting of",
)

PLACE_WORDS = {
    "middle": ("in the middle", "in the center", "in the centre"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "on top", "high up"),
    "bottom": ("at the bottom", "low down", "near the bottom"),
}

# Relations: words between first and second, then words between second and first.
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left of", "next to", "beside", "and", "with"),
    "above": ("above", "over", "floating above", "high above"),
    "on": ("on", "on", "on", "on", "on top of", "standing on", "sitting on", "riding"),
    "wearing": ("wearing", "wearing", "with", "in"),
}
INVERSE_WORDS = {
    "left of": ("to the right of", "right of", "on the right of", "next to", "beside", "and", "with"),
    "above": ("below", "under", "beneath", "underneath"),
    "on": ("under", "beneath", "carrying"),
    "wearing": ("on",),
}
VAGUE = {"next to", "beside", "and", "with"}  # true of more than one arrangement
INVERSE = {"left of": 0.5, "above": 0.4, "on": 0.07, "wearing": 0.1}  # how often
BOTH_PLACES = ("{} on the left and {} on the right", "{} on the left, {} on the right")

# Backgrounds: phrases that follow the subject, then single names that stand before or behind a comma.
BACKGROUND_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sunset": (
        (
            "at sunset",
            "at sunset",
            "at dusk",
            "under an orange sky",
            "in the evening",
            "in front of a sunset",
        ),
        ("sunset", "dusk", "evening"),
    ),
    "night": (
        ("at night", "in the night", "in the dark", "under the stars", "under a starry sky"),
        ("night", "starry night", "night sky"),
    ),
    "sea": (("at sea", "on the sea", "in the ocean", "on the water", "by the sea"), ("sea", "ocean")),
    "meadow": (
        ("on the grass", "in a meadow", "in a field", "on a green meadow", "in the grass"),
        ("meadow", "grass", "green field"),
    ),
    "snow": (("in the snow", "in winter", "on a snowy day", "in falling snow"), ("snow", "winter")),
    "desert": (("in the desert", "on the sand dunes", "among the dunes"), ("desert", "dunes")),
    "forest": (("in the forest", "in the woods", "in a forest", "among the pines"), ("forest", "woods")),
    "sky": (
        ("in the sky", "in the clouds", "among the clouds", "in a blue sky", "up in the air"),
        ("sky", "blue sky", "clouds"),
    ),
    "city": (
        ("in the city", "in town", "on the street", "in a city street", "downtown"),
        ("city", "street"),
    ),
    "mountains": (
        ("in the mountains", "in front of the mountains", "in the alps", "near snowy peaks"),
        ("mountains", "alps"),
    ),
    "beach": (("on the beach", "at the beach", "at the seaside", "on the shore"), ("beach", "seaside")),
    "underwater": (
        ("under water", "underwater", "under the sea", "on the sea floor"),
        ("underwater", "deep sea"),
    ),
    **{
        colour: (
            (
                f"on a {colour} background",
                f"on {colour}",
                f"in front of a {colour} wall",
                f"with a {colour} background",
            ),
            (f"{colour} background",),
        )
        for colour in ("pink", "yellow", "blue", "white")
    },
}


def caption(scene: Scene, rng: np.random.Generator, exact: bool = False) -> str:
    """One of the many captions of the scene, in lower case.

    An `exact` one always states background and arrangement, and in words that mean only these; it says
    nothing of sizes. That is what an evaluation can check.
    """
    subject = _one(scene, rng, exact) if len(scene.things) == 1 else _two(scene, rng, exact)
    opening = pick(rng, OPENINGS)
    if not exact and rng.random() >= BACKGROUND_STATED:
        return _join(opening, subject)
    phrases, names = BACKGROUND_WORDS[scene.background]
    order = rng.random()
    if order < 0.76:
        return _join(opening, subject, pick(rng, phrases))
    if order < 0.84:
        return _join(opening, subject) + ", " + pick(rng, names)
    return pick(rng, names if order < 0.94 else phrases) + ", " + subject


def _one(scene: Scene, rng: np.random.Generator, exact: bool) -> str:
    place = scene.arrangement
    stated = exact or rng.random() < PLACE_STATED.get(place, PLACE_STATED_ELSE)
    return _join(_noun_phrase(scene, 0, rng, exact), pick(rng, PLACE_WORDS[place]) if stated else "")


def _two(scene: Scene, rng: np.random.Generator, exact: bool) -> str:
    relation = scene.arrangement
    first, second = (_noun_phrase(scene, which, rng, exact) for which in (0, 1))
    if relation == "left of" and rng.random() < 0.15:
        return pick(rng, BOTH_PLACES).format(first, second)
    inverse = rng.random() < INVERSE[relation]
    options = (INVERSE_WORDS if inverse else RELATION_WORDS)[relation]
    between = pick(rng, [word for word in options if word not in VAGUE] if exact else options)
    return _join(second, between, first) if inverse else _join(first, between, second)


def _noun_phrase(scene: Scene, which: int, rng: np.random.Generator, exact: bool) -> str:
    """Article, size, colour, noun: 'a small red car', 'the fox', 'sunglasses'."""
    thing = THINGS[INDEX[scene.things[which]]]
    size = scene.sizes[which]
    sized = not exact and not (which == 1 and scene.arrangement == "wearing")
    size_word = pick(rng, SIZE_WORDS[size]) if sized and rng.random() < SIZE_STATED[size] else ""
    colour = pick(rng, thing.colours) if thing.colours and rng.random() < COLOUR_STATED else ""
    # The first noun is the usual one.
    noun = thing.name if rng.random() < 0.4 else pick(rng, thing.nouns)
    return with_article(pick(rng, ARTICLES), _join(size_word, colour, noun), thing.plural)


def with_article(article: str, phrase: str, plural: bool = False) -> str:
    """`phrase` after 'a' ('an' before a vowel, nothing before a plural), 'the' or ''."""
    if article == "a":
        article = "" if plural else "an" if phrase[0] in "aeiou" else "a"
    return _join(article, phrase)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def tell(seed: int, index: int, easy: float = 0.0) -> tuple[str, Scene, np.random.Generator]:
    """Caption and truth number `index` of `seed`, and the generator, which goes on to draw the picture."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    scene = sample_scene(rng, easy)
    return caption(scene, rng), scene, rng


def told(seed: int, first_index: int, n: int) -> tuple[list[str], list[Scene]]:
    """Captions and truths first_index .. first_index + n - 1, without drawing them."""
    captions, scenes, _ = zip(*(tell(seed, first_index + i) for i in range(n)), strict=True)
    return list(captions), list(scenes)


def _split(phrases: Iterable[str]) -> set[str]:
    return {word.strip(",{}") for phrase in phrases for word in phrase.split()} - {""}


def _thing_phrases(thing: Thing) -> Sequence[str]:
    return (*thing.nouns, *thing.colours)


@functools.cache
def words() -> frozenset[str]:
    """Every word that a caption can contain, and no other."""
    phrases = itertools.chain(
        ARTICLES,
        ("an",),
        OPENINGS,
        BOTH_PLACES,
        *SIZE_WORDS.values(),
        *PLACE_WORDS.values(),
        *RELATION_WORDS.values(),
        *INVERSE_WORDS.values(),
        *(_thing_phrases(thing) for thing in THINGS),
        *(phrases + names for phrases, names in BACKGROUND_WORDS.values()),
    )
    return frozenset(_split(phrases))


def vocabulary() -> set[str]:
    """`words()` as a set of the caller's own."""
    return set(words())
