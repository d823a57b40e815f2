"""What drawing with less work gains, and what it does to the pictures."""

import importlib.util
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine import loading
from engine.benchmark import timing
from engine.benchmark.drawing import Asked, Case
from engine.benchmark.peer import psnr
from engine.benchmark.report import Row
from engine.pipeline import Pipeline
from engine.weights import quantized

PROMPTS = [
    "a fox on a skateboard at sunset",
    "a red car next to a tree",
    "two cats on a beach",
    "a blue boat on the sea at night",
    "a dog above a house in the snow",
    "a green apple on a table",
    "an owl in a forest",
    "a yellow bus in a city",
]
WHOLE = "all of it"


def ways(asked: Asked, steps: int) -> dict[str, dict[str, Any]]:
    """name -> options of a call that is spared some of the work."""
    found = {
        WHOLE: {},
        "guidance to 0.8 of the steps": {"guidance_end": 0.8},
        "guidance to 0.6": {"guidance_end": 0.6},
        "guidance from 0.2 to 0.8": {"guidance_start": 0.2, "guidance_end": 0.8},
        "no guidance": {"guidance_scale": 1.0},
        "all of the U-Net at every 2nd step": {"cache_interval": 2},
        "at every 3rd": {"cache_interval": 3},
        "at every 5th": {"cache_interval": 5},
        "half of the finest tokens merged": {"merge_tokens": 0.5},
        "0.8 of the steps": {"steps": round(0.8 * steps)},
        "0.6 of the steps": {"steps": round(0.6 * steps)},
    }
    return {
        name: {"steps": steps, "guidance_scale": asked.guidance_scale, **own} for name, own in found.items()
    }


def rows(folder: pathlib.Path | None, asked: Asked, cases: Sequence[Case]) -> Iterator[Row]:
    """Of each case one for each way, in the same rounds and from the same noise; 8 bits if there is qwix."""
    pipe = loading.load(folder, dtype=asked.dtype, parallel=asked.parallel)
    others = {
        name: loading.load(folder, dtype=asked.dtype, parallel=asked.parallel, quantize=name)
        for name in (quantized.TYPES if importlib.util.find_spec("qwix") else ())
    }
    if asked.dtype != "bfloat16":
        others["bfloat16"] = loading.load(folder, dtype="bfloat16", parallel=asked.parallel)
    for case in cases:
        options = ways(asked, case.steps)
        calls = {name: (pipe, own) for name, own in options.items()}
        calls |= {name: (other, options[WHOLE]) for name, other in others.items()}
        yield from _of_case(asked, case, calls)


def _of_case(asked: Asked, case: Case, calls: dict[str, tuple[Pipeline, dict[str, Any]]]) -> Iterator[Row]:
    count = case.batch * calls[WHOLE][0].devices.count
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]

    def draw(name: str) -> np.ndarray:
        pipe, options = calls[name]
        sizes = {"height": case.side, "width": case.side, "batch_size": case.batch}
        return pipe.generate(prompts, seed=0, sampler=asked.sampler, **sizes, **options)

    drawn = {name: draw(name) for name in calls}
    seconds = timing.in_turn({name: lambda name=name: draw(name) for name in calls}, asked.rounds)
    for name, images in drawn.items():
        yield {
            "what": name,
            "batch": case.batch,
            "pixels": images.shape[1],
            "steps": case.steps,
            "images/s": count / statistics.median(seconds[name]),
            "times all of it": str(timing.ratio(seconds[WHOLE], seconds[name])),
            "dB to all of it": psnr(images, drawn[WHOLE]) if name != WHOLE else None,
            "_seconds": {name: seconds[name], WHOLE: seconds[WHOLE]},
        }
