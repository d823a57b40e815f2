"""Prompts, lists of prompts, and the warnings about what the model will not read."""

import pytest

from engine.text.prompts import (
    check_negative_prompts,
    check_prompt,
    check_prompts,
    unread,
)
from engine.text.tokenizer import train_tokenizer
from engine.types import UserError

CAPTIONS = ["a red fox at sunset", "a red cat at night"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 600, 12, words=CAPTIONS)


def test_good_prompts_pass_unchanged():
    for prompt in ("", "a fox", "a/b\0c\nd \u202e \N{FOX FACE}", "word " * 10_000):
        assert check_prompt(prompt) is prompt
    assert check_prompts(("a", "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a fox", r"one string; write a list: \['a fox'\]"),
        ([], "at least one string"),
        (None, "at least one string"),
        (7, "at least one string"),
        (["a", None], "a NoneType; write a string"),
        (["a", b"fox"], "a bytes; write a string"),
        (["a", "fox \udcff"], "character 5 is not Unicode text"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(UserError, match=message) as error:
        check_prompts(prompts)
    assert "\n" not in str(error.value)


def test_negative_prompts():
    assert check_negative_prompts(None, 2) == ["", ""]
    assert check_negative_prompts("fog", 2) == ["fog", "fog"]
    assert check_negative_prompts(["fog", "rain"], 2) == ["fog", "rain"]
    with pytest.raises(UserError, match="1 negative prompts for 2 prompts"):
        check_negative_prompts(["fog"], 2)


def test_nothing_to_warn_of(tokenizer):
    assert unread(["a red fox at night", ""], tokenizer) == []


def test_unknown_words_are_named_once_for_all_prompts(tokenizer):
    prompts = ["a red zebra", "a zebra at sea", "a red zebra"]
    assert unread(prompts, tokenizer) == ["words that the model never saw: zebra, sea"]


def test_long_prompts_show_where_they_are_cut(tokenizer):
    caption = "a red fox at sunset "  # five tokens; ten fit
    assert unread([caption * 2000] * 3, tokenizer) == [
        'prompt too long: the model reads 10 tokens; cut at | in "...at sunset a red fox at sunset '
        f'|a red fox at sunset a red fox ..." ({1998 * len(caption)} characters dropped); '
        "--long_prompts reads them, too"
    ]


def test_warnings_are_one_printable_line(tokenizer):
    nasty = "a\nred\0fox \u202e at \x1b[31m sunset \u2028 zeb\u200fra " * 50
    for warning in unread([nasty, " ".join(f"w{chr(97 + i % 26)}{'x' * i}" for i in range(30))], tokenizer):
        assert warning.isprintable()


def test_the_stump_of_a_word_that_is_cut_is_not_named(tokenizer):
    (warning,) = unread(["a red fox at night " + "fox" * 40], tokenizer)
    assert warning.startswith("prompt too long")
