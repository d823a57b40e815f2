"""What is read of a prompt: its words and their places, weights, parts, and what is cut."""

import itertools

import numpy as np
import pytest

from engine.text.prompts import unread
from engine.text.reading import MOST_PARTS, Reading, cut, parts, pieces, text_of, words
from engine.text.tokenizer import Tokenizer, train_tokenizer
from tests.text.test_tokenizer import CAPTIONS, LENGTH, NASTY, random_prompts

ROOM = LENGTH - 2
WEIGHTS, LONG, BOTH = Reading(weights=True), Reading(long=True), Reading(weights=True, long=True)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 640, LENGTH, words=CAPTIONS)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [i for i, _ in tokenizer.pieces(text)]


def merged(prompt: str) -> list[tuple[str, float]]:
    """Pieces, neighbours of one weight together."""
    groups = itertools.groupby(pieces(prompt), key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), pytest.approx(weight)) for weight, group in groups]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # the examples of AUTOMATIC1111's documentation
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *(("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1)),
                *(("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
            ],
        ),
        # and what they leave open
        ("", []),
        ("()", []),
        ("[fox", [("fox", 1 / 1.1)]),
        ("a ) b ] c :1.3) d", [("a ) b ] c :1.3) d", 1)]),
        ("(a:.5)(b: -1.2 )(c:x)(d:0)", [("a", 0.5), ("b", -1.2), ("c:x", 1.1), ("d", 0)]),
        (r"a\\b \c (d\):2)", [(r"a\b \c ", 1), ("d)", 2)]),
        ("([a) b]", [("a", 1), (" b", 1 / 1.1)]),
        ("3:4 (16:9) 12:30)", [("3:4 ", 1), ("16", 9), (" 12:30)", 1)]),
    ],
)
def test_marks(prompt, expected):
    assert merged(prompt) == expected


@pytest.mark.parametrize("prompt", [*NASTY, *random_prompts(200)])
def test_no_marks_no_change(trained, prompt):
    """Plain text is read as it ever was, whether brackets would be marks or not."""
    for mark in "()[]\\":
        prompt = prompt.replace(mark, "")
    (read,), (plain,) = parts(prompt, trained, WEIGHTS), parts(prompt, trained)
    assert read == plain and set(read.weights) <= {1.0}
    assert trained.filled(read.ids).tolist() == trained.encode([prompt])[0].tolist()


def test_a_backslash_keeps_every_bracket():
    prompt = "a (fox) [or: 2) a \\ cat"
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in prompt)
    assert "".join(text for text, _ in pieces(escaped)) == prompt
    assert {weight for _, weight in pieces(escaped)} == {1.0}


HOSTILE = {
    "nested": "(" * 50_000 + "a" + ")" * 49_999,
    "open": "(a" * 50_000,
    "crossed": "([" * 20_000 + ")]a" * 20_000,
    "digits": "(a:" + "1" * 99_990,
    "dots": "(a:1." * 20_000,
    "breaks": "BREAK a " * 12_500,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_prompts_are_read(trained, case):
    """100,000 letters, as many as a row may have."""
    assert all(abs(weight) <= 100 for _, weight in pieces(HOSTILE[case]))
    assert len(parts(HOSTILE[case], trained, BOTH)) <= MOST_PARTS


def test_each_token_has_the_weight_of_its_piece(trained):
    prompt = "a (red fox:1.5), at [sun]set"
    assert text_of(prompt, WEIGHTS) == "a red fox, at sun set" and text_of(prompt) == prompt
    (part,) = parts(prompt, trained, WEIGHTS)
    assert list(part.ids) == ids(trained, "a red fox, at sun set")
    counts = [len(ids(trained, piece)) for piece in ("a", "red fox", ", at", "sun", "set")]
    assert part.weights == tuple(np.repeat([1, 1.5, 1, 1 / 1.1, 1], counts).tolist())


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("(a fox:1.5)(night:0.2)", "a fox night"),
        ("(a fox)(night)", "a foxnight"),  # of one weight, it is one piece
        ("a (red:1.5)fox's (tail)!", "a red fox's tail!"),
        ("(fox:1)tail", "foxtail"),
    ],
)
def test_words_that_a_mark_divides_are_two_where_they_count_differently(prompt, text):
    """As in AUTOMATIC1111's, which reads the pieces one after another."""
    assert text_of(prompt, WEIGHTS) == text


def test_no_word_counts_more_than_a_hundred_times(trained):
    prompt = f"(a:{'9' * 400}) (fox:-1e) ((red:-99999):2)"
    (part,) = parts(prompt, trained, WEIGHTS)
    assert part.weights[0] == 100 and part.weights[-1] == -100
    assert pieces(f"((a:{'9' * 400}):0)") == [("a", 0)]


# ---- parts


def test_a_prompt_that_fits_is_one_part(trained):
    prompt = "fox " * ROOM
    assert len(parts(prompt, trained, LONG)) == 1 and parts(prompt, trained, LONG) == parts(prompt, trained)
    assert [part.ids for part in parts("", trained, LONG)] == [()]


@pytest.mark.parametrize("prompt", [" ".join(CAPTIONS[:20]), *(p for p in NASTY if p)])
def test_parts_are_the_whole_prompt(trained, prompt):
    found = parts(prompt, trained, LONG)
    read, whole = [i for part in found for i in part.ids], ids(trained, prompt)
    assert read == whole[: len(read)] and (len(read) == len(whole) or len(found) == MOST_PARTS)
    assert all(0 < len(part.ids) <= ROOM for part in found) or not prompt.strip()


def test_parts_end_behind_a_comma_near_the_end_or_else_between_words(trained):
    def texts(prompt):
        found = parts(prompt, trained, LONG)
        ends = [*(part.starts[0] for part in found[1:]), len(prompt)]
        return [prompt[part.starts[0] : end] for part, end in zip(found, ends, strict=True)]

    near = "fox " * (ROOM - 4) + "red, "  # the comma is the third token from the end
    assert texts(near + "fox " * 6) == [near, "fox " * 6]
    far = "fox " * 3 + "red, "
    assert texts(far + "fox " * ROOM) == [far + "fox " * (ROOM - 5), "fox " * 5]
    assert len(ids(trained, "skateboards")) > 1
    assert texts("fox " * (ROOM - 1) + "skateboards") == ["fox " * (ROOM - 1), "skateboards"]
    assert [len(part.ids) for part in parts("z" * 40, trained, LONG)] == [
        ROOM,
        ROOM,
        40 - 2 * ROOM,
    ]  # one word


def test_break_begins_a_part(trained):
    found = [part.ids for part in parts("a fox BREAK a cat, BREAK, at sunset", trained, LONG)]
    assert found == [tuple(ids(trained, text)) for text in ("a fox", "a cat,", ", at sunset")]
    assert [part.ids for part in parts("BREAK BREAK", trained, LONG)] == [()]
    for word in ("break", "BREAKS", "OUTBREAK"):
        assert len(parts(f"a {word} fox", trained, LONG)) == 1
    assert (
        ids(trained, "BREAK")[0] in parts("a BREAK fox", trained)[0].ids
    )  # a word, where prompts are not long


def test_a_break_stays_one_behind_marks(trained):
    first, second = parts("(a fox BREAK a cat:2)", trained, BOTH)
    assert (first.ids, second.ids) == (tuple(ids(trained, "a fox")), tuple(ids(trained, "a cat")))
    assert {*first.weights, *second.weights} == {2.0}
    for prompt in (
        "(a fox:1)BREAK(a cat:1)",
        "[(a fox)]BREAK a cat",
        "a fox BREAK(a cat:2)",
        "(a fox)BREAK(a cat)",
        "a fox BREAK:a cat",
        "a fox,BREAK a cat",
    ):
        assert len(parts(prompt, trained, BOTH)) == 2, prompt


# ---- words


def test_words_and_their_places(trained):
    prompt = "A  red-fox, zxqv!\t... by day"
    found = words(prompt, trained)
    assert [word for word, _ in found] == ["A", "red-fox", "zxqv", "...", "by", "day"]
    count = len(trained.pieces(prompt))
    assert [place for _, places in found for place in places] == list(range(1, count + 1))
    row = trained.encode([prompt])[0]
    for (word, places), written in zip(found, prompt.split(), strict=True):
        assert row[places].tolist() == ids(trained, written), word
    assert words("", trained) == []


def test_words_that_are_cut_have_no_places(trained):
    prompt = " ".join(["a"] * (ROOM + 3))
    assert words(prompt, trained) == [("a", [i + 1]) for i in range(ROOM)]


def test_a_word_of_several_vectors_has_as_many_places(trained):
    learned, _ = trained.with_token("<x>", 3)
    assert words("a <x> a", learned) == [("a", [1]), ("<x>", [2, 3, 4]), ("a", [5])]


def test_words_of_later_parts_stand_behind(trained):
    prompt = "a (fox:1.2) BREAK a (cat)"
    expected = [("a", [1]), ("fox", [2]), ("a", [LENGTH + 1]), ("cat", [LENGTH + 2])]
    assert words(prompt, trained, BOTH) == expected


# ---- what is cut


def test_cut_says_what_fell_off(trained):
    assert cut("a red fox", trained) is None
    many = " ".join(f"red{i}" for i in range(10_000))
    rest = cut(many, trained)
    kept = many[: -len(rest)]
    assert rest.endswith("red9999")
    np.testing.assert_array_equal(trained.encode([kept]), trained.encode([many]))
    assert cut(kept, trained) is None


def test_cut_is_exact_at_the_edge(trained):
    fits = "fox " * ROOM
    assert cut(fits, trained) is None
    assert cut(fits + "CAFÉ  au\nlait", trained) == "CAFÉ  au\nlait"


def test_long_prompts_are_cut_behind_many_parts(trained):
    fits = "fox " * (ROOM * MOST_PARTS)
    assert cut(fits, trained, LONG) is None
    assert cut(fits + "(a) cat", trained, BOTH) == "a cat"
    (warning,) = unread([fits + "cat"], trained, LONG)
    told = f"prompt too long: the model reads {MOST_PARTS} parts of at most {ROOM} tokens; cut at | in "
    assert warning.startswith(told)
    assert warning.endswith('fox |cat" (3 characters dropped)')


def test_warnings_of_marks_and_breaks(trained):
    """Neither is a word that the model never saw."""
    prompt = "a (red:1.5) fox BREAK at [sunset]"
    assert unread([prompt], trained, BOTH) == []
    assert unread([prompt], trained) == ["words that the model never saw: 1, 5, break"]
    assert unread(["a (zebra) BREAK"], trained, BOTH) == ["words that the model never saw: zebra"]
