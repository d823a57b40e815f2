"""FID and CLIP score of pictures as they come, in one pass that keeps none but the best and the worst.

    instruments = Instruments(Features("inception.safetensors"), load("photographs.npz"), ClipScorer("clip"))
    quality = measure(batches, instruments)

FID asks whether pictures look like a set of others, CLIP score whether they show what their captions say.
Either instrument may be left out.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from engine.evaluate.clip_score import ClipScorer, Pictures
from engine.evaluate.fid import Features
from engine.evaluate.frechet import Moments, check, frechet_distance, moments_of, shortage
from engine.models.inception import WIDTH
from engine.types import UserError

SHOWN = 8  # of the best pictures, and of the worst

Batch = tuple[Pictures, Sequence[str]]  # pictures of any sizes, and a caption for each


class Instruments(NamedTuple):
    """What pictures are measured with."""

    features: Features | None = None  # for FID
    reference: Moments | None = None  # of the pictures that FID compares with
    clip: ClipScorer | None = None

    @property
    def size(self) -> int:
        """Pictures that are measured at once: as many as fill the devices."""
        sizes = [self.features.size] if self.features else []
        sizes += [self.clip.batch_size * self.clip.devices.count] if self.clip else []
        return max(sizes, default=1)


class Rated(NamedTuple):
    """A picture and how CLIP sees it."""

    score: float  # 0..100
    number: int  # its place among all, from 0
    picture: UInt8[np.ndarray, "_ _ 3"]
    caption: str


class Quality(NamedTuple):
    """What `measure` found. What belongs to an instrument that was left out is None, 0 or empty."""

    pictures: int
    fid: float | None
    shortages: tuple[str, ...]  # warnings where there are too few pictures for FID, a line each
    clip_score: float | None  # the mean over the pictures, 0..100
    clip_error: float | None  # the standard error of that mean; None for a single picture
    truncated: int  # captions whose end CLIP did not read
    best: tuple[Rated, ...]  # the best first
    worst: tuple[Rated, ...]  # the worst first; none is among the best


def measure(
    batches: Iterable[Batch], instruments: Instruments, progress: Callable[[int], Any] = lambda count: None
) -> Quality:
    """Measures pictures, each with its caption.

    Args:
      batches: of any lengths, one after another as they are drawn or read.
      progress: called with the number of pictures that are done, again and again.

    Raises:
      UserError: no pictures, or, for FID, a single one, or statistics that cannot be compared with.
      ValueError: other numbers of pictures and captions, or FID without statistics to compare with.
    """
    features, reference, clip = instruments
    if features is not None:
        if reference is None:
            raise ValueError("features without a reference")
        check_reference(reference)
    scores = Scores()
    done = 0

    def through() -> Iterator[Float[np.ndarray, "_ 2048"]]:
        """The features of all pictures; on the way they are scored."""
        nonlocal done
        pairs = _pairs(batches)
        while some := list(itertools.islice(pairs, instruments.size)):
            pictures, captions = zip(*some, strict=True)
            if clip is not None:
                scores.add(done, pictures, captions, clip)
            if features is not None:
                yield features.features_of(pictures)
            done += len(some)
            progress(len(some))

    fid, shortages = None, ()
    if features is None or reference is None:
        for _ in through():
            pass
        if not done:
            raise UserError("no pictures to judge: give 1 or more")
    else:
        moments = moments_of(through())
        fid = frechet_distance(moments, reference)
        both = ((moments, "the judged pictures"), (reference, "the reference's pictures"))
        shortages = tuple(filter(None, (shortage(*each) for each in both)))
    return Quality(done, fid, shortages, *scores.summary())


def check_reference(reference: Moments) -> None:
    """Raises UserError where FID cannot be taken against these statistics."""
    check(reference)
    if len(reference.mean) != WIDTH:
        raise UserError(
            f"the reference's statistics are of {len(reference.mean)} features, and FID's are {WIDTH}: "
            "take them with the same network"
        )


class Scores:
    """CLIP scores, and the pictures at both ends of them."""

    def __init__(self) -> None:
        self._scores: list[Float[np.ndarray, " _"]] = []
        self._truncated = 0
        self._best: list[Rated] = []
        self._worst: list[Rated] = []

    def add(self, first: int, pictures: Sequence[np.ndarray], captions: Sequence[str], clip: ClipScorer):
        """Scores some more. `first`: place of the first among all."""
        found = clip.score([(pictures, captions)])
        self._scores.append(found.scores)
        self._truncated += found.truncated
        numbers = itertools.count(first)
        rated = list(map(Rated, found.scores.tolist(), numbers, pictures, captions))
        best = heapq.nlargest(SHOWN, [*self._best, *rated], key=lambda one: (one.score, -one.number))
        worst = heapq.nsmallest(SHOWN, [*self._worst, *rated], key=lambda one: (one.score, one.number))
        # Copied: a picture is a view of its batch, and would keep all of it.
        self._best = [one._replace(picture=one.picture.copy()) for one in best]
        self._worst = [one._replace(picture=one.picture.copy()) for one in worst]

    def summary(self) -> tuple[float | None, float | None, int, tuple[Rated, ...], tuple[Rated, ...]]:
        """The fields of Quality from clip_score on."""
        if not self._scores:
            return None, None, 0, (), ()
        scores = np.concatenate(self._scores).astype(np.float64)
        error = float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else None
        best = self._best[: -(-len(scores) // 2)]  # where there are few, each stands on one side
        worst = self._worst[: len(scores) // 2]
        return float(scores.mean()), error, self._truncated, tuple(best), tuple(worst)


def _pairs(batches: Iterable[Batch]) -> Iterator[tuple[np.ndarray, str]]:
    for pictures, captions in batches:
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures for {len(captions)} captions")
        yield from zip(pictures, captions, strict=True)
