"""How speed grows with the devices, with the same work for each."""

import pathlib
import statistics
from collections.abc import Iterator, Sequence

import jax

from engine import pipeline
from engine.benchmark import timing
from engine.benchmark.drawing import Asked, Case, draw, work_for
from engine.benchmark.report import Row
from engine.parallel import Devices
from engine.types import UserError


def rows(folder: pathlib.Path | None, asked: Asked, case: Case, counts: Sequence[int]) -> Iterator[Row]:
    """One for each number of devices, all timed in turn.

    "a device" is images/s of each against those of the fewest devices. Simulated devices share the cores of
    one machine: of those, "together" is images/s against those of the fewest, which would stay the same if
    spreading the work cost nothing.

    Raises:
      UserError: there are not so many devices.
    """
    found = jax.local_devices()
    if max(counts) > len(found):
        raise UserError(f"devices={max(counts)}: there are {len(found)} here")
    calls, images = {}, {}
    for count in sorted(counts):
        pipe = pipeline.load(folder, dtype=asked.dtype, parallel=Devices(asked.parallel, found[:count]))
        work = work_for(pipe, asked, case)
        calls[str(count)] = lambda pipe=pipe, work=work: draw(pipe, work)
        images[str(count)] = len(work.prompts)
        calls[str(count)]()
    seconds = timing.in_turn(calls, asked.rounds)
    fewest = str(min(counts))
    for count in calls:
        rate = images[count] / statistics.median(seconds[count])
        together = timing.ratio([images[count] / images[fewest] * s for s in seconds[fewest]], seconds[count])
        yield {
            "devices": int(count),
            "batch": case.batch,
            "images/s": rate,
            "together": str(together),
            "a device": together.median * int(fewest) / int(count),
            "_seconds": seconds[count],
        }
