"""Every thing can be drawn, seen apart from the others, and named."""

import functools

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from engine.emoji import BITMAP_SIZE, font_path
from engine.world.nouns import plural_of
from engine.world.scene import COLOURS
from engine.world.things import COLOUR_WORDS, HATTED, INDEX, THINGS

KINDS = {
    *("animal", "person", "food", "vehicle", "plant", "tool", "music", "weather", "clothes", "building"),
    *("sport", "object"),
}
ADVANCE = 135.71875  # pixels that one glyph of the font takes at BITMAP_SIZE


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path()), BITMAP_SIZE)


def seen(emoji: str, side: int) -> np.ndarray:
    """The picture on white, as large as fits, in [0, 255]."""
    canvas = Image.new("RGBA", (400, 192))
    ImageDraw.Draw(canvas).text((24, 24), emoji, font=font(), embedded_color=True)
    box = canvas.getbbox()
    assert box is not None, f"the font has no {emoji}"
    picture = canvas.crop(box)
    picture.thumbnail((side, side), Image.Resampling.BOX)
    white = Image.new("RGBA", (side, side), "white")
    white.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(white.convert("RGB"), float)


def test_there_are_enough_things_of_every_kind():
    assert len(THINGS) >= 200
    assert {thing.kind for thing in THINGS} == KINDS
    for name in ("astronaut", "cook", "farmer", "fox", "horse", "skateboard", "sunglasses", "car"):
        assert name in INDEX


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow joins no emoji: it lacks raqm")
@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.name)
def test_the_emoji_is_one_picture(thing):
    assert font().getlength(thing.emoji) == ADVANCE
    assert seen(thing.emoji, 40).min() < 200  # what the font lacks is drawn as nothing


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow joins no emoji: it lacks raqm")
def test_no_two_things_look_alike():
    """At 40 pixels the pictures differ by a root mean square of 20 of 255 and more."""
    flat = np.stack([seen(thing.emoji, 40).ravel() for thing in THINGS])
    squares = (flat**2).sum(1)
    apart = np.sqrt((squares[:, None] + squares - 2 * flat @ flat.T).clip(0) / flat.shape[1])
    np.fill_diagonal(apart, 255)
    a, b = np.unravel_index(apart.argmin(), apart.shape)
    assert apart[a, b] > 20, f"{THINGS[a].name} and {THINGS[b].name}"


def test_every_noun_means_one_thing():
    words = [noun for thing in THINGS for noun in {*thing.nouns, *thing.plurals}]
    assert len(words) == len(set(words))
    assert all(1 <= len(thing.nouns) <= 4 for thing in THINGS)
    assert all(noun == noun.lower().strip() for noun in words)


def test_plurals():
    for thing in THINGS:
        assert len(thing.plurals) == (0 if thing.pair else len(thing.nouns)), thing.name
    told = {"fox": "foxes", "cherry": "cherries", "monkey": "monkeys", "mouse": "mice", "box": "boxes"}
    told |= {"slice of pizza": "slices of pizza", "loaf of bread": "loaves of bread", "wolf": "wolves"}
    told |= {"maple leaf": "maple leaves", "santa": "santas", "sheep": "sheep", "cup of tea": "cups of tea"}
    assert {noun: plural_of(noun) for noun in told} == told


def test_traits_fit_each_other():
    for thing in THINGS:
        for fraction in (*(thing.eyes or ()), *(thing.hand or ())):
            assert 0 < fraction < 1, thing.name
        assert thing.worn in ("", "eyes", "head")
        assert not (thing.worn and thing.eyes), f"{thing.name} wears and is worn"
        assert set(thing.true_colours) <= set(COLOURS), thing.name
    assert all(THINGS[INDEX[name]].eyes for name in HATTED)
    assert THINGS[INDEX["fox"]].paints and "red" not in THINGS[INDEX["fox"]].true_colours
    assert THINGS[INDEX["car"]].paints and "red" not in THINGS[INDEX["car"]].true_colours
    assert not THINGS[INDEX["moon"]].paints and not THINGS[INDEX["fire"]].paints


def test_every_colour_word_means_one_colour():
    assert tuple(COLOUR_WORDS) == COLOURS
    words = [word for group in COLOUR_WORDS.values() for word in group]
    assert len(words) == len(set(words))
    assert all(group[0] == colour for colour, group in COLOUR_WORDS.items())
    assert {"scarlet", "crimson"} < set(COLOUR_WORDS["red"])
