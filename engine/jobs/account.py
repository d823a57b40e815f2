"""Books that a worker keeps: contexts that may come again, and how long the devices were at work."""

import collections

import jax
import numpy as np

from engine.requests import Context


class Recent:
    """Contexts by prompt; the oldest go when there are too many, or too many bytes of them."""

    def __init__(self, most: int, room: int):
        self._most, self._room, self._bytes = most, room, 0
        self._found: collections.OrderedDict[str, Context] = collections.OrderedDict()

    def __contains__(self, text: str) -> bool:
        return text in self._found

    def __getitem__(self, text: str) -> Context:
        self._found.move_to_end(text)
        return self._found[text]

    def add(self, text: str, context: Context) -> None:
        if text in self._found:
            self._bytes -= _bytes_of(self._found.pop(text))
        # A row of an array keeps the whole array alive; a copy does not.
        self._found[text] = jax.tree.map(np.copy, context)
        self._bytes += _bytes_of(context)
        while (self._bytes > self._room and len(self._found) > 1) or len(self._found) > self._most:
            self._bytes -= _bytes_of(self._found.popitem(last=False)[1])


def _bytes_of(context: Context) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(context))


class Busy:
    """For how long a batch was on the devices."""

    def __init__(self):
        self._began: float | None = None
        self._until = 0.0  # end of the last batch
        self._busy = 0.0
        self._span = 0.0

    def add(self, launched: float, ready: float) -> None:
        """A batch, in the order in which they are launched; times of time.monotonic()."""
        begin = launched if self._began is None else max(launched, self._until)
        if self._began is None:
            self._began = self._until = launched
        self._busy += ready - begin
        self._span += ready - self._until
        self._until = ready

    def pause(self) -> None:
        """The account goes on with the next batch."""
        self._began = None

    def idle(self) -> float:
        """Share of the time so far in which nothing was on the devices."""
        return 1 - self._busy / self._span if self._span else 0.0


def out_of_memory_or_raise(error: BaseException) -> None:
    """Raises an error of JAX that is another."""
    # What waits for a program that had too little tells of it in words alone.
    told = any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
    if isinstance(error, jax.errors.JaxRuntimeError) and not told:
        raise error
