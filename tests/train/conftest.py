"""Training steps, as all that is tiny, are compiled quickly."""

import pytest

from tests.tiny import compiled_quickly


@pytest.fixture(scope="package", autouse=True)
def quick_compiler():
    with compiled_quickly():
        yield
