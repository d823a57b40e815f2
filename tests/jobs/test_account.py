"""What a worker remembers of words."""

import numpy as np

from engine.jobs.account import Recent
from engine.requests import Context


def context(value: float = 0.0) -> Context:
    return Context(np.full((4, 8), value, np.float32))  # 128 bytes


def test_contexts_that_come_again_are_counted_once():
    """Those of no words do, with every shard of long prompts; all others would have to go for them."""
    kept = Recent(10, 300)
    for value in range(100):
        kept.add("", context(value))
    kept.add("a fox", context())
    assert "" in kept and "a fox" in kept and kept[""].words[0, 0] == 99


def test_the_oldest_go_where_there_are_too_many_bytes():
    kept = Recent(10, 300)
    for text in ("a", "b", "c"):
        kept.add(text, context())
    assert ("a" in kept, "b" in kept, "c" in kept) == (False, True, True)
    assert kept["b"] is not None
    kept.add("d", context())
    assert ("b" in kept, "c" in kept) == (True, False)  # the one that was asked for stays


def test_the_oldest_go_where_there_are_too_many():
    kept = Recent(2, 10**9)
    for text in ("a", "b", "c"):
        kept.add(text, context())
    assert ("a" in kept, "b" in kept, "c" in kept) == (False, True, True)
