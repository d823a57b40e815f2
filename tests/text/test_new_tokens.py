"""Tokens that a tokenizer did not begin with: of one vector, and of several."""

import numpy as np
import pytest

from engine.text.prompts import unread
from engine.text.reading import cut
from engine.text.tokenizer import EOS, Tokenizer, train_tokenizer
from engine.types import UserError
from tests.tiny import CAPTIONS, MAX_TOKENS

PLAIN = train_tokenizer(CAPTIONS * 2, 640, MAX_TOKENS, CAPTIONS)  # every word is a token
ONE, (ONE_ID,) = PLAIN.with_token("<one>", 1)
BOTH, IDS = ONE.with_token("<Three-Times>", 3)


def words(tokenizer: Tokenizer, prompt: str) -> list[int]:
    (row,) = tokenizer.encode([prompt]).tolist()
    return row[1 : row.index(tokenizer.eos_id)]


def test_ids_are_the_next_ones_and_all_others_stay():
    assert [ONE_ID, *IDS] == list(range(PLAIN.vocab_size, PLAIN.vocab_size + 4))
    assert (PLAIN.vocab_size, ONE.vocab_size, BOTH.vocab_size) == (ONE_ID, ONE_ID + 1, IDS[-1] + 1)
    np.testing.assert_array_equal(PLAIN.encode(CAPTIONS), BOTH.encode(CAPTIONS))
    assert ONE_ID not in PLAIN.encode(["a <one>"])


@pytest.mark.parametrize("prompt", ["a <three-times> fox", "a<THREE-times>fox", " A  <Three-Times>  FOX\n"])
def test_a_token_of_three_vectors_is_three_ids(prompt):
    a, fox = words(PLAIN, "a fox")
    assert words(BOTH, prompt) == [a, *IDS, fox]


def test_padded_with_another_token_words_stay():
    """As in Stable Diffusion 2 and the second tokenizer of XL; learned tokens, too."""
    other = BOTH.padded_with("!")
    assert (other.pad_id, other.vocab_size, other.padded_with("!")) == (0, BOTH.vocab_size, other)
    prompts = [*CAPTIONS, "a <three-times> fox, <one>"]
    ours, theirs = other.encode(prompts), BOTH.encode(prompts)
    ends = (theirs == BOTH.eos_id).argmax(-1)[:, None]
    np.testing.assert_array_equal(ours, np.where(np.arange(MAX_TOKENS) > ends, 0, theirs))
    with pytest.raises(UserError, match="has no token '<none>' to fill prompts up with"):
        BOTH.padded_with("<none>")


def test_what_is_cut_begins_with_the_first_word_that_is_not_read_whole():
    fits = "fox " * (MAX_TOKENS - 5)
    assert cut(f"{fits}<three-times>", BOTH) is None
    assert cut(f"{fits}<three-times> at night", BOTH) == " at night"[1:]
    assert cut(f"fox {fits}<three-times> at night", BOTH) == "<three-times> at night"
    assert words(BOTH, f"fox {fits}<three-times>")[-2:] == IDS[:2]  # as diffusers reads it


def test_a_new_token_is_no_unknown_word():
    assert PLAIN.unknown_words("a <one> fox") == ["one"]
    assert BOTH.unknown_words("a <one> fox, <THREE-Times>zebra one <three-times>") == ["zebra", "one"]
    assert unread(["a <one> at night"], BOTH) == []
    (warning,) = unread(["zebra <one> " + "fox " * MAX_TOKENS], BOTH)[1:]
    assert warning == "words that the model never saw: zebra"


def test_they_are_saved_and_loaded(tmp_path):
    BOTH.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    prompts = [*CAPTIONS, "<one> <three-times> <one>", "<three-times>_1"]
    np.testing.assert_array_equal(again.encode(prompts), BOTH.encode(prompts))
    assert again.unknown_words("<one><three-times>") == []


@pytest.mark.parametrize(
    ("token", "vectors"),
    [
        ("fox", 1),
        ("FOX", 2),
        ("<one>", 1),
        ("<ONE>", 1),
        ("<Three-Times>_1", 1),
        (EOS, 1),
        ("!", 1),
        ("", 1),
    ],
)
def test_what_means_something_already_is_refused(token, vectors):
    with pytest.raises(UserError, match="is in the tokenizer already"):
        BOTH.with_token(token, vectors)


def test_no_token_becomes_longer_by_another():
    with pytest.raises(UserError, match="'<one>_1' would become a further vector of '<one>'"):
        BOTH.with_token("<one>_1", 1)
    with pytest.raises(UserError, match="'<Three-Times>_3' would become"):
        BOTH.with_token("<Three-Times>_3", 2)
    further, _ = PLAIN.with_token("<two>_1", 1)
    with pytest.raises(UserError, match="'<two>_1' is in the tokenizer already"):
        further.with_token("<two>", 1)
    BOTH.with_token("<one>_2", 1)


def test_pieces_say_how_a_word_is_spelt():
    ((fox, spelling),) = PLAIN.pieces("Fox")
    assert ([fox], spelling) == (words(PLAIN, "fox"), "fox</w>")
    assert len(PLAIN.pieces("zebra")) > 1 and PLAIN.pieces(" ") == []
