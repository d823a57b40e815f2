"""A batch on its way through the programs: from noise to pictures.

Where larger ones are asked for (`Settings.larger`), what was drawn is enlarged, and drawn over at its new
size from the noise level that a strength says: at the size that it was trained for a model draws the whole
better, at a larger one what is in it. AUTOMATIC1111's web UI calls that hires fix.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from engine import adapters, controls, edits
from engine.checking import Checking
from engine.diffusion import noise, schedules
from engine.diffusion.samplers import Trace
from engine.diffusion.segments import chosen_stages
from engine.enlarging import Enlarging
from engine.judging import Judging, arrived, spread
from engine.parallel import pad
from engine.programs import NOTHING, Programs
from engine.prompting import Prompting
from engine.requests import Candidates, Context, Finished, Frames, Request, Settings
from engine.sizing import Sizing
from engine.types import Latents
from engine.ways import grid_of, ways_of

Contexts = Mapping[str, Context]
Progress = Callable[[int], None] | None


class Pass(NamedTuple):
    """What came of one."""

    start: Latents  # its unit noise
    final: Latents
    traces: list[Trace | None]
    images: jax.Array
    finite: jax.Array
    watched: tuple  # what `Programs.steering` takes of the model's part


@dataclasses.dataclass(frozen=True)
class Passes:
    """The programs that a batch goes through."""

    programs: Programs
    refiner: Programs | None
    prompting: Prompting
    sizing: Sizing
    checking: Checking | None
    enlarging: Enlarging | None
    judging: Judging | None

    def __call__(
        self,
        requests: Sequence[Request],
        contexts: Contexts,
        settings: Settings,
        latents: np.ndarray | None = None,
        frames: int = 0,
        heat: bool = False,
        progress: Progress = None,
    ) -> tuple[Finished, Frames | None, jax.Array | None]:
        """One batch: what is finished, frames, heat; see `Pipeline.stream`."""
        devices, count = self.programs.devices, len(requests)
        batches, of = spread(requests, settings.candidates, self._size(settings))
        several = settings.candidates > 1
        of = of if several else None  # one after another
        seen = (0, False) if several else (frames, heat)
        best, shown = None, (None, None)
        for batch in batches:
            found, *shown = self._drawn(batch, contexts, settings, latents, *seen, progress)
            best = self.judging.choose(best, found) if best and self.judging else found
        if several and (frames or heat):  # how those were made that are kept
            kept = arrived(Finished(*devices.fetch(best), of), count).index.tolist()
            again = [one._replace(index=index) for one, index in zip(requests, kept, strict=True)]
            (batch,), _ = spread(again, 1, self._size(settings))
            _, *shown = self._drawn(batch, contexts, settings, None, frames, heat, progress)
        if self.enlarging and not settings.larger:
            images, finite = self.enlarging(best.images, best.finite)
            best = best._replace(images=images, finite=finite)
        return Finished(*devices.gather(best), of), *shown

    def _drawn(
        self,
        requests: Sequence[Request],
        contexts: Contexts,
        settings: Settings,
        latents: np.ndarray | None,
        frames: int,
        heat: bool,
        progress: Progress,
    ) -> tuple[Candidates, Frames | None, jax.Array | None]:
        """A whole batch, before an upscaler enlarges what it was drawn at its last size."""
        devices, keys = self.programs.devices, _keys(requests)
        start = None if latents is None else devices.shard_batch(pad(latents, len(requests)))
        passes = [self._go(requests, contexts, settings, keys, start, frames > 0, heat, progress)]
        first = passes[0]
        heats = devices.gather(self.programs.steering(*first.watched)) if heat else None
        images, finite = first.images, first.finite
        if settings.larger:
            if self.enlarging:
                images, finite = self.enlarging(images, finite)
            passes.append(self._over(images, requests, contexts, settings.larger, keys, frames > 0, progress))
            images, finite = passes[-1].images, passes[-1].finite & finite
        safe = self.checking(images) if self.checking else finite
        index = devices.shard_batch(np.array([r.index for r in requests], np.uint32))
        scores = None
        if self.judging:
            scores = self.judging.scores(images, np.stack([contexts[r.prompt].judged for r in requests]))
        found = Candidates(images, finite, safe, index, scores)
        return found, self._frames(passes, frames) if frames else None, heats

    def prepare(self, requests: Sequence[Request], settings: Settings, traced: bool) -> None:
        """Has the compiler begin with the first pass of such a batch, while its words are read.

        Not where how many there are matters, nor where it would look at pictures for it.
        """
        programs, asked = self.programs, (settings, traced)
        if not programs.compiling.useful or programs.texts.reading.long or asked in programs.prepared:
            return
        if any(r.given.image is not None or r.given.control or r.given.image_prompt for r in requests):
            return
        programs.prepared.add(asked)
        (requests, *_), _ = spread(requests, 1, self._size(settings))
        keys = _keys(requests)
        blank = programs.texts.blank(len(requests))
        contexts = {text: blank for r in requests for text in (r.prompt, r.negative_prompt)}
        start = jax.ShapeDtypeStruct((len(requests), *latent_shape(programs, settings)), np.float32)
        batched, _ = self._batched(requests, contexts, settings, keys, {}, start)
        way, *_ = ways_of(settings, programs, self.refiner)
        programs.compile_ahead(way, start, batched, traced)

    def _size(self, settings: Settings) -> int:
        """Pictures of a batch."""
        return settings.batch_size * self.programs.devices.count

    def _over(self, images, requests, contexts, larger: Settings, keys, framed, progress) -> Pass:
        """What was drawn, enlarged and drawn over."""
        given = {"image": self.sizing(images, larger.height, larger.width)}
        return self._go(
            requests, contexts, larger, noise.larger_keys(keys), None, framed, False, progress, given
        )

    def _go(
        self,
        requests: Sequence[Request],
        contexts: Contexts,
        settings: Settings,
        keys: noise.Keys,
        start: jax.Array | None,
        framed: bool,
        heat: bool,
        progress: Progress,
        given: Mapping[str, Any] | None = None,
    ) -> Pass:
        """Through sampler and decoder.

        Args:
          start: unit noise; None: that of the keys.
          framed, heat: whether stages are to be shown, and which word steered what.
          given: pictures to change, on the devices; None: those of the requests.
        """
        programs = self.programs
        if given is None:
            given = programs.devices.shard_batch(edits.pixels([r.given for r in requests]))
        batched, start = self._batched(requests, contexts, settings, keys, given, start)
        config, sigmas = grid_of(settings, programs.model)
        way, *more_ways = ways_of(settings, programs, self.refiner)
        x, traces = programs.sample(way, start, batched, framed or heat, progress)
        watched = way, tuple(traces), batched
        if self.refiner:
            of_refiner = {prompt: context.refiner for prompt, context in contexts.items()}
            further = noise.further_keys(keys)
            # A picture to change says nothing more on its part of the way, but for what a mask keeps.
            seen = given if "mask" in given or self.refiner.made_for != edits.WORDS else {}
            told = self.refiner.batched(requests, of_refiner, settings, further, seen)
            x, more = self.refiner.sample(*more_ways, x, told, framed, progress)
            traces += more
        final = x * schedules.final_scale(config, sigmas)
        images, finite = programs.decode(final, given or NOTHING)
        return Pass(start, final, traces, images, finite, watched)

    def _batched(self, requests, contexts, settings, keys, given, start) -> tuple[dict[str, Any], Any]:
        """What differs from picture to picture, and the noise that each begins with, as in `_go`."""
        programs, beside = self.programs, [r.given for r in requests]
        shown = programs.devices.shard_batch(controls.pixels(beside))
        shown = tuple(self.sizing(each, settings.height, settings.width) for each in shown)
        tokens = self.prompting(adapters.pixels(beside, programs.adapters))
        batched = programs.batched(requests, contexts, settings, keys, given, shown, tokens)
        return batched, programs.noise(batched, latent_shape(programs, settings)) if start is None else start

    def _frames(self, passes: Sequence[Pass], count: int) -> Frames:
        """`count` stages, evenly spread over the steps of all passes, at the size of the last one."""
        stages = [sum(trace.x.shape[1] for trace in each.traces if trace) + 1 for each in passes]
        # Another pass begins with what the one before it ended with.
        lasts = np.cumsum([stages[0], *(more - 1 for more in stages[1:])]) - 1
        chosen = np.linspace(0, lasts[-1], count).round().astype(int)
        passed = np.searchsorted(lasts, chosen)  # the pass that each is of
        found = []
        for i, (each, last, own) in enumerate(zip(passes, lasts, stages, strict=True)):
            places = chosen[passed == i] - last + own - 1
            for kind in chosen_stages(each.traces, each.start, each.final, places):
                found.append(self._decoded(kind, *passes[-1].images.shape[1:3]))
        return Frames(*(np.concatenate(found[kind::2], axis=1) for kind in range(2)))

    def _decoded(self, stages: np.ndarray, height: int, width: int) -> np.ndarray:
        devices = self.programs.devices
        places = [devices.shard_batch(x) for x in stages.swapaxes(0, 1)]
        pictures = [self.sizing(self.programs.decode(x)[0], height, width) for x in places]
        shape = len(stages), 0, height, width, 3
        return np.stack([np.asarray(p) for p in pictures], axis=1) if pictures else np.zeros(shape, np.uint8)


def _keys(requests: Sequence[Request]) -> noise.Keys:
    """Of their noise."""
    return noise.image_keys([r.seed for r in requests], [r.index for r in requests])


def latent_shape(programs: Programs, settings: Settings) -> tuple[int, int, int]:
    """Of one picture's latents."""
    config = programs.model.vae.config
    return settings.height // config.scale, settings.width // config.scale, config.latent_channels
