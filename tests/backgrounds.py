"""The drawn world with few backgrounds."""

import contextlib
import functools
from collections.abc import Iterator

import pytest

from engine.world import compose, drawing

MANY = drawing.tables  # as users have them


@functools.cache
def _table() -> compose.Textures:
    return compose.textures(drawing.sprites(), variants=1)


@contextlib.contextmanager
def few() -> Iterator[None]:
    """Each background is painted once, not eight times: seconds of every process of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "tables", _table)
        yield
