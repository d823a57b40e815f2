"""The tests of what measures pictures draw the world with few backgrounds."""

import pytest

from tests.backgrounds import few


@pytest.fixture(scope="package", autouse=True)
def few_backgrounds():
    with few():
        yield
