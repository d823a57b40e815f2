"""What the tests of output folders that fail have in common."""

import contextlib
import time
from collections.abc import Iterator

import pytest

from engine.errors import UserError

PATIENCE = 0.2  # seconds
SLACK = 10.0  # seconds more than it should take, where the machine is busy
QUICK = 5.0  # seconds, much less than the patience of a minute

# Of a store in which there is a file 'there'.
CALLS = {
    "write": lambda store: store.write("a", b"x"),
    "create": lambda store: store.create("new", b"x"),
    "read": lambda store: store.read("there"),
    "open": lambda store: store.open("there").close(),
    "names": lambda store: store.names(""),
    "times": lambda store: store.times(""),
    "delete": lambda store: store.delete("there"),
    "publish": lambda store: store.publish(made(store), "shards/000000"),
}


def made(store):
    folder = store.spool() / "000000"
    folder.mkdir(exist_ok=True)
    for name in "abc":
        (folder / name).write_bytes(b"x")
    return folder


@contextlib.contextmanager
def takes(least: float, most: float) -> Iterator[None]:
    """Seconds."""
    began = time.monotonic()
    yield
    assert least <= time.monotonic() - began < most + SLACK


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    """A UserError of one line."""
    with pytest.raises(UserError, match=message) as error:
        yield
    assert "\n" not in str(error.value)
