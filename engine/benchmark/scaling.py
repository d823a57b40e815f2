"""How speed grows with the devices, with the same work for each."""

import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from engine import loading
from engine.benchmark import timing
from engine.benchmark.drawing import Asked, Case, Work, draw, work_for
from engine.benchmark.report import Row
from engine.diffusion import guidance, noise
from engine.parallel import Devices
from engine.parts import computed
from engine.pipeline import Pipeline
from engine.requests import Request
from engine.types import UserError
from engine.ways import ways_of

SAMPLING = ("sampler", "bare calls")


def rows(folder: pathlib.Path | None, asked: Asked, case: Case, counts: Sequence[int]) -> Iterator[Row]:
    """One for each number of devices, all timed in turn.

    "a device" is images/s of each against those of the fewest devices. Simulated devices share the cores of
    one machine: of those, "together" is images/s against those of the fewest, which would stay the same if
    spreading the work cost nothing. "over bare calls" is the time of the sampler against that of as many
    calls of the U-Net alone, with nothing between them.

    Raises:
      UserError: there are not so many devices.
    """
    found = jax.local_devices()
    if max(counts) > len(found):
        raise UserError(f"devices={max(counts)}: there are {len(found)} here")
    calls, images = {}, {}
    for count in sorted(counts):
        pipe = loading.load(folder, dtype=asked.dtype, parallel=Devices(asked.parallel, found[:count]))
        work = work_for(pipe, asked, case)
        calls[str(count)] = lambda pipe=pipe, work=work: draw(pipe, work)
        images[str(count)] = len(work.prompts)
        calls[f"{count}, sampler"], calls[f"{count}, bare calls"] = sampling(pipe, work)
    for call in calls.values():
        call()
    seconds = timing.in_turn(calls, asked.rounds)
    fewest = str(min(counts))
    for count in images:
        rate = images[count] / statistics.median(seconds[count])
        together = timing.ratio([images[count] / images[fewest] * s for s in seconds[fewest]], seconds[count])
        yield {
            "devices": int(count),
            "batch": case.batch,
            "images/s": rate,
            "together": str(together),
            "a device": together.median * int(fewest) / int(count),
            "over bare calls": str(timing.ratio(*(seconds[f"{count}, {what}"] for what in SAMPLING))),
            "_seconds": {what: seconds[what] for what in (count, *(f"{count}, {what}" for what in SAMPLING))},
        }


def sampling(pipe: Pipeline, work: Work) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The whole way from noise to latents; and as many calls of the U-Net, one after another."""
    settings, programs, count = work.settings, pipe.programs, len(work.prompts)
    (way,) = ways_of(settings, programs, None)
    requests = [Request(prompt, "", 0, i, settings.guidance_scale) for i, prompt in enumerate(work.prompts)]
    contexts = pipe.encode([*work.prompts, ""], settings.batch_size)
    batched = programs.batched(requests, contexts, settings, noise.image_keys(0, range(count)), {})
    start = pipe.devices.shard_batch(work.latents)

    def call(params: Any, batched: Any) -> Any:
        words = batched["cond"], batched["uncond"]
        apply = guidance.guided(
            programs.denoising.bound(params), *words, batched["guidance_scale"], run_uncond=way.guided
        )
        return apply(batched["x"], jnp.full(len(batched["x"]), 500.0))

    bare, params = pipe.devices.map(call), computed(programs.model.unet.params, pipe.devices)
    ready = {**batched, "x": start}

    def sample() -> None:
        jax.block_until_ready(programs.sample(way, start, batched)[0])

    def calls() -> None:
        jax.block_until_ready([bare(params, ready) for _ in range(way.steps)])

    return sample, calls
