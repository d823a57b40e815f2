"""A batch of a job on its way: words and pictures beside them, on the devices, drawn."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from engine import finish
from engine.jobs.loras import Own
from engine.jobs.plan import Shard, Wanted
from engine.requests import Context, Finished, Given, Request


class Load(NamedTuple):
    """A batch of a shard, ready for the devices."""

    shard: Shard
    wanted: list[Wanted]
    refused: list[dict[str, Any]]  # what will not be drawn, and why
    contexts: dict[str, Context]  # where its rows have own LoRAs, when those are in memory
    words: Sequence[Request]  # of all of its shard
    last: bool  # of its shard
    given: Sequence[Given] = ()  # of all that is wanted, until they are drawn
    marks: Sequence[Mapping[str, str]] = ()  # that tell them from others

    @property
    def lora(self) -> Own | None:
        """What its rows are drawn with in place of the job's, where they are."""
        return self.shard.group.program and self.shard.group.program.lora

    @property
    def requests(self) -> list[Request]:
        if not self.given:
            return [one.request for one in self.wanted]
        return [one.request._replace(given=each) for one, each in zip(self.wanted, self.given, strict=True)]


class Flying(NamedTuple):
    """A batch on the devices."""

    load: Load
    arrival: Future | None  # of a Finished on the host; None where it could not be launched
    batch_size: int


class Picture(NamedTuple):
    """One that has been drawn; see `Finished`."""

    image: finish.Picture
    finite: bool
    safe: bool
    index: int
    score: float | None


class Drawn(NamedTuple):
    """A batch that has been drawn."""

    load: Load
    finished: Finished | None  # on the host; None where there was nothing to draw
    batch_size: int

    @property
    def pictures(self) -> Iterator[Picture]:
        """Of all that is wanted."""
        if self.finished is None:
            return
        images, finite, safe, index, scores, _ = self.finished
        for i, image in enumerate(images):
            score = None if scores is None else float(scores[i])
            yield Picture(image, bool(finite[i]), bool(safe[i]), int(index[i]), score)
