"""One worker: from shards to pictures in the output folder, so that the devices never wait.

Three threads, each at most a few batches ahead of the next:

  words     rows -> requests, contexts and pictures beside the words (engine/text, and the text encoder)
  drawing   requests -> pictures. Two batches are always on the devices: one at work, one waiting
  writing   pictures -> PNGs -> shards (the caller's thread, and `writers` threads for the PNGs)

Out of memory halves the batch and goes on; the batch that failed is drawn again in parts.

Where several hosts draw each batch together, their programs must be launched in one order: then words and
drawing share a thread, and the first host writes.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

import engine
from engine import finish
from engine.config import JobConfig
from engine.jobs import digests, folder, formats
from engine.jobs.account import Busy, out_of_memory_or_raise
from engine.jobs.ahead import ahead
from engine.jobs.batches import Drawn, Flying, Load, Picture
from engine.jobs.given import Paths
from engine.jobs.pictures import enlarged, remember
from engine.jobs.plan import Group, Job, Shard, Wanted
from engine.jobs.reading import Reader
from engine.jobs.settling import Program, Settle
from engine.jobs.store import Store
from engine.jobs.wording import Changed, TooLong, Wordings
from engine.judging import arrived
from engine.pipeline import Pipeline
from engine.requests import Context, Finished, Request, Settings
from engine.text.reading import said
from engine.types import UserError

BATCHES_AHEAD = 4  # of words before drawing, and of drawn pictures before writing
ON_DEVICES = 2  # batches: one at work, one that waits
READERS = 4  # threads that read pictures beside the words


# What a picture that was made of words remembers of another: nothing, whatever the job's own options.
NO_PICTURE = {**Paths().told(), "strength": None}


@dataclasses.dataclass
class Tally:
    """What a worker has done."""

    shards: int = 0
    pictures: int = 0
    failures: int = 0
    idle: float = 0.0  # share of time in which no batch was on the devices, compilation left out


class Worker:
    """Draws shards of a job with a loaded model."""

    def __init__(
        self,
        job: Job,
        settle: Settle,
        pipe: Pipeline,
        store: Store,
        tell: Callable[[str], None],
        progress: Callable[[int], None] = lambda pictures: None,
        still_ours: Callable[[str], bool] = lambda shard: True,
        check: Callable[[], None] = lambda: None,
    ):
        """Args:
        tell: gets a line for people now and then.
        progress: called with the number of pictures of each batch that is through.
        check: called often, from the thread of `run`; what it raises stops the work.
        still_ours: asked before a shard is put in its place.
        """
        self.job, self.settle, self.pipe, self.store = job, settle, pipe, store
        self.tell, self.progress, self.still_ours, self.check = tell, progress, still_ours, check
        self.tally = Tally()
        self._name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.too_long = TooLong(pipe, tell)
        self._wordings = Wordings(pipe)
        # of the last shard whose rows have own LoRAs
        self._said: tuple[Sequence[Request], dict[str, Context]] | None = None
        self._halved: dict[Program, int] = {}  # pictures a device, after out of memory
        self._no_room: dict[Program, str] = {}  # not for one picture; why its rows are not drawn
        self._busy = Busy()
        self._reader = Reader(settle.pictures, pipe.devices, store)

    def run(self, shards: Iterable[Shard | None]) -> Iterator[Shard]:
        """Draws and writes the shards, and yields each when it is done.

        Args:
          shards: read a few batches ahead of their drawing. None: there may be more later, and what was begun
            is to be finished now.

        Raises:
          UserError: the folder cannot be written, or memory does not suffice for a single picture.
        """
        writers = ThreadPoolExecutor(self.job.config.writers, "png")
        loads = self._loads(shards)
        if self.pipe.devices.alone:
            loads = ahead(loads, BATCHES_AHEAD)
        # Pictures that an upscaler has enlarged are many times larger to wait.
        batches = ahead(self._draw(loads), 1 if self.pipe.enlarging else BATCHES_AHEAD, self.check)
        try:
            with contextlib.closing(batches):
                yield from self._write(batches, writers)
        finally:
            writers.shutdown(cancel_futures=True)

    # ---- words

    def _loads(self, shards: Iterable[Shard | None]) -> Iterator[Load | None]:
        with ThreadPoolExecutor(READERS, "pictures") as readers:
            for shard in shards:
                if shard is None:
                    yield None
                elif shard.group.program is None:
                    refused = [one._asdict() for one in self.job.refused(shard, self.settle)]
                    yield Load(shard, [], refused, {}, [], True)
                else:
                    yield from self._loads_of(shard, readers)

    def _loads_of(self, shard: Shard, readers: ThreadPoolExecutor) -> Iterator[Load]:
        wanted = list(self.job.wanted(shard))
        self.too_long.look_at(wanted)
        program, contexts, words = shard.group.program, {}, [one.request for one in wanted]
        if program and program.lora is None:
            contexts = self._wordings.of(None).of(words)
        first = 0
        while first < len(wanted):
            size = self._batch_size(shard.group) * self.pipe.devices.count
            batch = wanted[first : first + size]
            first += size
            load = Load(shard, batch, [], contexts, words, first >= len(wanted))
            yield self._opened(load, readers) if shard.group.program.beside else load

    def _opened(self, load: Load, readers: ThreadPoolExecutor) -> Load:
        wanted, given, failures = self._reader.open(load.wanted, self._settings(load.shard.group), readers)
        marks = list(readers.map(digests.of_given, given))
        return load._replace(wanted=wanted, given=given, marks=marks, refused=failures)

    # ---- drawing

    def _batch_size(self, group: Group) -> int:
        assert group.settings is not None
        return self._halved.get(group.program.compiled, group.settings.batch_size)

    def _draw(self, loads: Iterator[Load | None]) -> Iterator[Drawn]:
        flying: collections.deque[Flying] = collections.deque()
        compiled: set[Program] = set()
        with ThreadPoolExecutor(1, "arrivals") as arrivals, contextlib.closing(loads):
            for load in loads:
                program = load and load.wanted and load.shard.group.program
                new = program and program.compiled not in compiled
                if load is None or new or not self._wordings.are_there(load.lora):
                    while flying:
                        yield self._land(flying.popleft())
                    self._busy.pause()  # nothing could fill this time: it is left out of the account
                if load is None:
                    continue
                if program:
                    compiled.add(program.compiled)
                flying.append(self._launch(self._loaded(load), arrivals))
                if len(flying) == ON_DEVICES:
                    yield self._land(flying.popleft())
            while flying:
                yield self._land(flying.popleft())

    def _loaded(self, load: Load) -> Load:
        """The load, when LoRAs of its rows are in memory; where they cannot be, with nothing to draw."""
        if not load.wanted or load.lora is None:
            return load
        try:
            wording = self.store.patiently(lambda: self._wordings.of(load.lora), "LoRAs of rows")
        except Changed as error:
            refused = [{**one.address, "reason": str(error)} for one in load.wanted]
            return load._replace(wanted=[], given=(), marks=(), refused=[*load.refused, *refused])
        if self._said is None or self._said[0] is not load.words:  # the first of its shard
            self._said = load.words, wording.of(load.words)
        return load._replace(contexts=self._said[1])

    def _launch(self, load: Load, arrivals: ThreadPoolExecutor) -> Flying:
        """Sets the devices to work on a batch, unless there is nothing to draw, or no room for it."""
        if not load.wanted:
            return Flying(load, None, 0)
        settings = self._settings(load.shard.group)
        flying = Flying(load, None, settings.batch_size)
        requests = load.requests
        if len(requests) > settings.batch_size * self.pipe.devices.count:
            return flying  # it was cut before the batch was halved
        if load.shard.group.program.compiled in self._no_room:
            return flying
        pipe = self._wordings.of(load.lora).pipe
        try:
            arrays = pipe.dispatch(requests, load.contexts, settings)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            out_of_memory_or_raise(error)
            self._halve(load.shard.group, settings.batch_size)
            return flying
        arrival = arrivals.submit(self._arrive, arrays, len(requests), time.monotonic())
        return flying._replace(arrival=arrival)

    def _arrive(self, arrays: Finished, count: int, launched: float) -> Finished:
        jax.block_until_ready(arrays)
        self._busy.add(launched, time.monotonic())
        return arrived(arrays, count)

    def _land(self, flying: Flying) -> Drawn:
        """Waits for a batch; where memory ran out, draws it again in smaller ones."""
        load, arrival, batch_size = flying
        if not load.wanted:
            return Drawn(load, None, 0)
        if arrival is not None:
            try:
                return Drawn(load._replace(given=()), arrival.result(), batch_size)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                out_of_memory_or_raise(error)
                self._halve(load.shard.group, batch_size)
        return self._draw_in_parts(load)

    def _draw_in_parts(self, load: Load) -> Drawn:
        group, pipe = load.shard.group, self._wordings.of(load.lora).pipe
        while (why := self._no_room.get(group.program.compiled)) is None:
            settings = self._settings(group)
            size = settings.batch_size * self.pipe.devices.count
            requests = load.requests
            found: list[Finished] = []
            try:
                for first in range(0, len(requests), size):
                    part = requests[first : first + size]
                    found.append(arrived(pipe.dispatch(part, load.contexts, settings), len(part)))
                whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *found)
                return Drawn(load._replace(given=()), whole, settings.batch_size)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                out_of_memory_or_raise(error)
                self._halve(group, settings.batch_size)
        refused = [*load.refused, *({**wanted.address, "reason": why} for wanted in load.wanted)]
        self.progress(len(load.wanted))
        return Drawn(load._replace(wanted=[], given=(), refused=refused), None, 0)

    def _settings(self, group: Group) -> Settings:
        assert group.settings is not None
        return dataclasses.replace(group.settings, batch_size=self._batch_size(group))

    def _halve(self, group: Group, batch_size: int) -> None:
        """Halves the batch of the group, unless a batch before this one did so already.

        Where one picture is too large, and its row wants it so, what is of its size is given up; where all
        pictures are of that size, UserError.
        """
        if batch_size != self._batch_size(group):
            return
        settings = group.settings
        assert settings is not None
        height, width = settings.size
        size = f"{width} x {height}"
        if not self.pipe.devices.alone:  # the other hosts may have had room
            raise UserError(f"out of memory at {size}; write --batch_size {max(batch_size // 2, 1)}")
        if batch_size == 1:
            smaller = "" if self.pipe.devices.platform == "cpu" else "--dtype bfloat16 or "
            smaller = smaller if self.job.config.tile else f"--tile 512 or {smaller}"
            lower = "a smaller --hires" if settings.larger else "a smaller size"
            told = f"out of memory with one picture of {size} a device; write"
            if (settings.height, settings.width) == (self.job.config.height, self.job.config.width):
                raise UserError(f"{told} {smaller}{lower}")
            self._no_room[group.program.compiled] = f"{told} a smaller size"
            self.tell(f"out of memory with one picture of {size} a device: such rows are not drawn")
            return
        self._halved[group.program.compiled] = batch_size // 2
        self.tell(
            f"out of memory at {size}: {batch_size // 2} pictures a device from here on, not {batch_size}"
        )

    # ---- writing

    def _write(self, batches: Iterator[Drawn], writers: ThreadPoolExecutor) -> Iterator[Shard]:
        entries: list[formats.Entry] = []
        failures: list[dict[str, Any]] = []
        began = time.time()
        for drawn in batches:
            load = drawn.load
            if not self.pipe.devices.leads:
                self.progress(len(load.wanted))
                continue
            every = load.wanted, drawn.pictures, load.marks or itertools.repeat({})
            for entry in writers.map(self._finish, *every, itertools.repeat(drawn)):
                (entries if isinstance(entry, formats.Entry) else failures).append(entry)
            failures += load.refused
            self.progress(len(load.wanted))
            if load.last:
                self._put(load.shard, entries, failures, drawn.batch_size, began)
                entries, failures, began = [], [], time.time()
                yield load.shard

    def _finish(
        self,
        wanted: Wanted,
        picture: Picture,
        marks: Mapping[str, str],
        drawn: Drawn,
    ) -> formats.Entry | dict[str, Any]:
        """The last touches of one picture: an entry of the shard, or why there is none."""
        row, request = wanted.row, wanted.request
        address = wanted.address | {"index": picture.index}
        if not picture.finite or not picture.safe:
            held = "held back by the safety checker"
            return {**address, "reason": held if picture.finite else "a NaN or an infinity in the picture"}
        program = drawn.load.shard.group.program
        how = self._settings(drawn.load.shard.group)
        settings = dataclasses.asdict(how)
        settings |= {"guidance_scale": request.guidance_scale, "batch_size": drawn.batch_size}
        changed = self._changed(wanted, program)
        own = {"negative_prompt": request.negative_prompt, "seed": request.seed}
        config = dataclasses.replace(self.job.config, **settings | own | NO_PICTURE | changed)
        contents = {**self.job.digests, **marks}
        if (lora := drawn.load.lora) is not None:
            contents["lora"] = lora.mark
        try:
            about = remember(config, request.prompt, picture.index, {k: v for k, v in contents.items() if v})
            image = enlarged(picture.image, how.size, config)
            png = finish.encode_png(image, about)
        except UserError as error:
            return {**address, "reason": str(error)}
        facts = {**address, "prompt": request.prompt, "negative_prompt": request.negative_prompt}
        if (words := said(request.prompt, self.pipe.reading)) != request.prompt:
            facts["caption"] = words  # without marks, for who trains on it
        facts |= {name: settings[name] for name in ("guidance_scale", "steps", "sampler")}
        facts |= dict(zip(("height", "width"), image.shape[:2], strict=True))
        facts |= {} if picture.score is None else {"clip_score": round(picture.score, 4)}
        edit = {name: value for name, value in changed.items() if value != "" or name == "lora"}
        facts |= {"edit": edit} if changed else {}
        facts |= {"sha256": hashlib.sha256(png).hexdigest(), "extra": row.extra}
        return formats.Entry(png, facts)

    def _changed(self, wanted: Wanted, program: Program) -> dict[str, Any]:
        """What a picture remembers of those beside its words, and of own LoRAs; nothing of none."""
        pictures, row = self.settle.pictures, wanted.row
        found = pictures.paths(row).told() if program.beside else {}
        found |= {} if program.lora is None else {"lora": program.lora.told}
        if not program.image:
            return found
        found |= {"strength": pictures.strength(row, program.mask)}
        return found | {"image_guidance_scale": wanted.request.image_guidance_scale}

    def _put(self, shard, entries, failures, batch_size, began) -> None:
        """Writes a whole shard and its manifest, unless it is another worker's by now."""
        if not self.still_ours(shard.name):
            self.tell(f"shard {shard.name} was taken over by another worker; ours is dropped")
            return
        manifest = self._manifest(shard, entries, failures, batch_size, began)
        data = None
        if entries:
            data = self.store.patiently(
                lambda: formats.write_shard(self.store.spool(), shard.name, self.job.config.format, entries)
            )
        if folder.commit(self.store, shard.name, data, manifest, failures):
            self.tally.shards += 1
            self.tally.pictures += len(entries)
            self.tally.failures += len(failures)
        self.tally.idle = self._busy.idle()

    def _manifest(self, shard, entries, failures, batch_size, began) -> dict[str, Any]:
        config: JobConfig = self.job.config
        devices = self.pipe.devices
        return {
            "shard": shard.number,
            "format": config.format,
            "worker": self._name,
            "began": round(began, 3),  # seconds since 1970
            "ended": round(time.time(), 3),
            "failures": len(failures),
            "settings": {
                "version": engine.__version__,
                "model": self.pipe.name,
                "dtype": self.pipe.dtype,
                "parallel": devices.mode,
                "devices": f"{devices.count} x {devices.devices[0].device_kind}",
                "batch_size": batch_size,
                "upscale": config.upscale,
            },
            "pictures": [entry.facts for entry in entries],
        }
