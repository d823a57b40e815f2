"""The tags of captions, shuffled on the host."""

import pytest

from engine.train import data
from engine.world.drawing import laid_out
from tests.tiny import tiny_tokenizer

TAGS = ["fox", "red", "night", "grass", "moon", "tree"]
CAPTION = ", ".join(TAGS)


def orders(steps, keep_tags=0):
    """Of two places at each step, one after the other."""
    return [c for step in steps for c in data.shuffled([CAPTION, CAPTION], 3, step, keep_tags)]


def test_an_order_is_addressed_by_seed_step_and_place():
    whole = orders(range(6))
    assert orders(range(4, 6)) == whole[8:]  # as a run that was resumed draws them
    assert data.shuffled([CAPTION], 3, 5, first_place=1) == whole[11:]  # or a process with its part
    drawn = [*whole, *data.shuffled([CAPTION], 4, 0)]
    assert len(set(drawn)) == len(drawn)


def test_all_tags_stay_and_the_first_in_their_places():
    for caption in orders(range(10), keep_tags=2):
        tags = caption.split(", ")
        assert sorted(tags) == sorted(TAGS) and tags[:2] == TAGS[:2]
    firsts = {caption.split(", ")[2] for caption in orders(range(50), keep_tags=2)}
    assert firsts == set(TAGS[2:])


@pytest.mark.parametrize("caption", ["a fox, at night", "a fox", "", "fox , night"])
def test_where_nothing_may_move_only_spaces_change(caption):
    kept = ", ".join(tag.strip() for tag in caption.split(","))
    assert data.shuffled([caption], 0, 0, keep_tags=2) == [kept]


def test_batches_have_their_captions_shuffled(monkeypatch):
    monkeypatch.setattr(data, "laid_out", lambda *args: laid_out(*args)._replace(captions=[CAPTION] * 2))
    tokenizer = tiny_tokenizer()
    plain, mixed = (data.captioned_pictures(5, 2, 32, tokenizer, keep_tags=keep)(7) for keep in (None, 0))
    assert (plain["ids"] == tokenizer.encode([CAPTION] * 2)).all()
    assert (mixed["ids"] == tokenizer.encode(data.shuffled([CAPTION] * 2, 5, 7))).all()
    assert (mixed["ids"] != plain["ids"]).any()
