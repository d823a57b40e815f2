"""How fast pictures are drawn, alone or beside a peer."""

import dataclasses
import pathlib
import resource
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from engine import chips, loading
from engine.benchmark import compiled, energy, outline, timing
from engine.benchmark.peer import Peer, psnr
from engine.benchmark.report import Row
from engine.diffusion import noise
from engine.diffusion.scheduler_config import for_sampler
from engine.parallel import Devices
from engine.pipeline import Pipeline
from engine.requests import Settings

# Of prompts; random tokenizers read them, too.
WORDS = ["fog", "sea", "red", "oak", "fox", "sun", "hat", "ice"]
ALIKE = 40.0  # dB, of pictures of a peer in float32


@dataclasses.dataclass
class Asked:
    """What is measured, but for sizes."""

    sampler: str | None
    guidance_scale: float
    dtype: str
    parallel: str
    rounds: int


class Case(NamedTuple):
    """Sizes of what is measured."""

    batch: int  # pictures a device
    side: int | None = None  # pixels; None: as the model was made for
    steps: int = 20


class Work(NamedTuple):
    """A batch to draw."""

    prompts: list[str]
    latents: np.ndarray  # unit noise (B, h, w, C)
    settings: Settings


def rows(
    folder: pathlib.Path | None, asked: Asked, cases: Sequence[Case], peers: Sequence[str]
) -> Iterator[Row]:
    """One for each case, ours and, in the same rounds, the peers'."""
    jax.config.update("jax_enable_compilation_cache", False)  # what compiling takes is part of what is asked
    pipe = loading.load(folder, dtype=asked.dtype, parallel=asked.parallel)
    others = [Peer(pipe.folder, asked.dtype, compiled=name.endswith("compiled")) for name in peers]
    for case in cases:
        work = work_for(pipe, asked, case)
        yield row(pipe, asked, work, dict(zip(peers, others, strict=True)))


def work_for(pipe: Pipeline, asked: Asked, case: Case) -> Work:
    settings = pipe.settings(
        case.steps, asked.sampler, asked.guidance_scale, case.side, case.side, batch_size=case.batch
    )
    whole = case.batch * pipe.devices.count
    prompts = [" ".join((WORDS[i % 8], WORDS[i // 8 % 8], WORDS[i // 64 % 8])) for i in range(whole)]
    shape = outline.latent_shape(pipe.model, settings.height)
    latents = np.asarray(noise.initial_noise(noise.image_keys(0, range(whole)), shape))
    return Work(prompts, latents, settings)


def draw(pipe: Pipeline, work: Work) -> np.ndarray:
    settings = work.settings
    return pipe.generate(
        work.prompts,
        seed=0,
        latents=work.latents,
        steps=settings.steps,
        sampler=settings.sampler,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        batch_size=settings.batch_size,
    )


def row(pipe: Pipeline, asked: Asked, work: Work, peers: dict[str, Peer]) -> Row:
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: draw(pipe, work)}
    first = timing.first_call(calls["ours"])
    config = for_sampler(pipe.model.scheduler, work.settings.sampler)
    for name, peer in peers.items():
        calls[name] = lambda peer=peer: peer.draw(work, config)
    alike = {name: psnr(draw(pipe, work), calls[name]()) for name in peers}
    apart = {"text": lambda: encode(pipe, work), "decoder": lambda: decode(pipe, work)}
    for call in apart.values():
        call()
    seconds = timing.in_turn({**calls, **apart}, asked.rounds)
    ours, images = statistics.median(seconds["ours"]), len(work.prompts)
    sampling = ours - sum(statistics.median(seconds[part]) for part in apart)
    work_done = arithmetic(pipe, work)
    counters = energy.counters(pipe.devices.platform, [d.local_hardware_id for d in pipe.devices.devices])
    joules = energy.joules(calls["ours"], asked.rounds, counters)
    found: dict[str, Any] = {
        "batch": work.settings.batch_size,
        "pixels": work.settings.height,
        "steps": work.settings.steps,
        "dtype": asked.dtype,
        "compile s": first.compiling,
        "first call s": first.seconds,
        "images/s": images / ours,
        "steps/s": work.settings.steps / sampling,
        "TFLOP an image": work_done / images / 1e12,
        "TFLOP/s a device": work_done / ours / pipe.devices.count / 1e12,
        "MFU": utilisation(pipe.devices, work_done / ours),
        "peak GB": peak_memory(pipe.devices, alone=not peers),
        "J an image": None if joules is None else joules / images,
        "_seconds": seconds,
    }
    for name in peers:
        found[f"{name} images/s"] = images / statistics.median(seconds[name])
        found[f"times {name}"] = str(timing.ratio(seconds[name], seconds["ours"]))
        found[f"dB to {name}"] = alike[name]
    return found


def encode(pipe: Pipeline, work: Work) -> None:
    pipe.encode([*work.prompts, ""], work.settings.batch_size)


def decode(pipe: Pipeline, work: Work) -> None:
    jax.block_until_ready(pipe.programs.decode(pipe.devices.shard_batch(work.latents)))


def arithmetic(pipe: Pipeline, work: Work) -> int:
    """FLOP of a whole batch, on all devices: those of the model, without what kernels add."""
    alone = Devices("shard_map", pipe.devices.devices[:1])
    settings = work.settings
    parts = outline.drawing(pipe.model, alone, settings.height, len(work.prompts), settings.sampler)
    counted = {name: compiled.arithmetic(part) for name, part in parts.items()}
    step = counted["unet"] if settings.guidance_scale == 1 else counted["sampler"] / outline.SEGMENT
    prompts = (len(set(work.prompts)) + 1) / len(work.prompts)
    return round(pipe.steps_of(settings) * step + counted["decoder"] + prompts * counted["text"])


def utilisation(devices: Devices, rate: float) -> float | None:
    """The share of what the devices could do at best; None where that is not known."""
    peak = chips.peak(devices.devices[0])
    return rate / devices.count / peak if peak else None


def peak_memory(devices: Devices, alone: bool) -> float | None:
    """GB of a device; of CPUs those of the process, unless a peer is in it."""
    if stats := devices.devices[0].memory_stats():
        return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 if alone else None
