"""The run of launch.generate with --prompts_file, once its flags are read."""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.config import JobConfig
from engine.diffusion.noise import fresh_seed
from engine.jobs import digests, folder, formats, given
from engine.jobs.claims import Claims
from engine.jobs.plan import Job, Shard, make_plan
from engine.jobs.processes import Processes, find_processes
from engine.jobs.settling import Settle, settle_with
from engine.jobs.store import Store, open_store
from engine.jobs.work import Worker
from engine.parallel import meet
from engine.pipeline import Pipeline
from engine.text.prompts import check_prompt
from engine.text.rows import Rows, read_rows, unread_columns
from engine.types import UserError
from launch import cli
from launch.drawing import HALF, advice_where_memory_runs_out, open_model

POLL = 1.0  # seconds between looks at what other workers have done
LINE_EVERY = 10.0  # seconds between lines of progress where nobody watches a bar


def run(options: dict[str, Any]) -> int:
    """Draws this process's part of a job; returns the exit code."""
    cli.stop_if_asked()
    config = JobConfig(**options)
    # Workers with claims need not know each other.
    told = (config.processes, config.process_id)
    processes = Processes(0, 1, "elastic") if config.elastic else find_processes(*told)
    formats.check_installed(config.format)
    with read_rows(config.prompts_file, cli.stdin()) as rows:
        for warning in unread_columns(rows.columns):
            cli.tell(f"warning: {warning}")
        store = open_store(config.out, config.patience, cli.tell, pause=cli.pause)
        together = config.split_params and not config.elastic and processes.count > 1
        if together:
            meet(config.coordinator, processes.count, processes.id)
        pipe = open_model(config, together)
        job, settle = begin(config, rows, pipe, store)
        if config.elastic:
            with Claims(store, config.lease, cli.tell) as claims:
                work(job, settle, pipe, store, claims)
        else:
            if processes.count > 1:
                cli.tell(f"process {processes.id} of {processes.count} ({processes.source})")
            work(job, settle, pipe, store, (0, 1) if together else (processes.id, processes.count))
    if not pipe.devices.leads:
        return cli.DONE
    return cli.FAILED if folder.write_failures(store) else cli.DONE


def begin(config: JobConfig, rows: Rows, pipe: Pipeline, store: Store) -> tuple[Job, Settle]:
    """The plan, and job.json in the folder.

    Without a seed it is that of the job that was begun there, or a fresh one.
    """
    if config.seed is None:
        config = dataclasses.replace(config, seed=folder.seed_of(store))
    fresh = config.seed is None
    if fresh:
        config = dataclasses.replace(config, seed=fresh_seed())
    given.check_flags(config)
    check_prompt(config.negative_prompt)
    settle = settle_with(config, pipe)
    height, width = pipe.default_size
    filled = pipe.settings(
        config.steps,
        config.sampler,
        config.guidance_scale,
        config.height,
        config.width,
        strength=1.0 if config.strength is None else config.strength,
        **config.of_the_way(),
    )
    config = dataclasses.replace(
        config, sampler=filled.sampler, height=config.height or height, width=config.width or width
    )
    found = digests.of_files(config, pipe.folder)
    job = make_plan(config, rows, settle, found, progress=Planning(len(rows)).step)
    # A row that cannot be drawn may have had one.
    changed = job.pictured and any(group.program is None or group.program.image for group in job.groups)
    for name in ("mask", "strength", "image_guidance_scale"):
        if (value := getattr(config, name)) not in (None, "", getattr(JobConfig, name, None)) and not changed:
            raise UserError(
                f"{name}={value} without a picture: write --image FILE, or a column image in the rows"
            )
    job = folder.enter(store, job, any_seed=fresh)
    if fresh:
        cli.tell(f"seed {job.config.seed}")
    return job, settle


def work(job: Job, settle: Settle, pipe: Pipeline, store: Store, part: Claims | tuple[int, int]) -> None:
    """Draws the shards that are this worker's, and says how far it is.

    Args:
      part: claims, or (number of this process, number of all).
    """
    description, finished = job.describe(), agreed(job, folder.done(store), pipe)
    # Without claims a worker knows its part, of which the bar tells.
    mine = range(job.shards) if isinstance(part, Claims) else range(job.shards)[part[0] :: part[1]]
    done = sum(folder.pictures_of(description, int(name)) for name in finished if int(name) in mine)
    total = sum(folder.pictures_of(description, number) for number in mine)
    programs = f", {job.programs} programs to compile" if len(finished) < job.shards else ""
    cli.tell(
        f"{job.pictures} pictures of {len(job.rows)} rows in {job.shards} shards{programs}"
        + (f"; {len(finished)} shards are done" if finished else "")
    )
    tell_of_refused(job, settle)
    stopping = threading.Event()
    claims = part if isinstance(part, Claims) else None
    with Progress(total, done) as progress:
        if claims is None:
            shards = split(job, finished, *part)
        else:
            shards = take(job, store, claims, stopping, progress.elsewhere)
        worker = Worker(
            job,
            settle,
            pipe,
            store,
            cli.tell,
            progress.step,
            claims.holds if claims else lambda shard: True,
            cli.stop_if_asked,
        )
        try:
            with advice_where_memory_runs_out("a smaller --shard_size", HALF):
                for shard in worker.run(shards):
                    if claims:
                        claims.release(shard.name)
                    if pipe.devices.leads:
                        cli.say(f"{store.url}/manifests/{shard.name}.json")
        except KeyboardInterrupt as stop:
            where = f"{worker.tally.shards} shards were finished; the same command goes on"
            raise type(stop)(where) from None
        finally:
            stopping.set()
    tally = worker.tally
    cli.tell(
        f"{tally.pictures} pictures in {tally.shards} shards, {tally.failures} failures, "
        f"{progress.rate():.3g} images/s; the devices were idle for {tally.idle:.1%} of the time"
    )
    if many := worker.too_long.count:
        cli.tell(f"warning: {many} pictures have prompts that were too long to be read to their end")


def tell_of_refused(job: Job, settle: Settle) -> None:
    """That there are rows that cannot be drawn, before those that can be are."""
    last = job.groups[-1]
    if last.program is None:
        first = next(job.refused(job.shard(last.first_shard), settle))
        cli.tell(
            f"warning: {last.count} of {len(job.rows)} rows cannot be drawn; the first is row {first.row} "
            f"(id {first.id[:40]}): {first.reason}"
        )


def agreed(job: Job, finished: set[str], pipe: Pipeline) -> set[str]:
    """The shards that are done, the same set on all hosts that work together."""
    names = folder.names(job.describe())
    marks = pipe.devices.agree(np.array([name in finished for name in names], bool))
    return {name for name, mark in zip(names, marks, strict=True) if mark}


def split(job: Job, finished: set[str], process: int, processes: int) -> Iterator[Shard]:
    """Every so many'th shard that is not done yet."""
    for number in range(process, job.shards, processes):
        shard = job.shard(number)
        if shard.name not in finished:
            yield shard


def take(
    job: Job,
    store: Store,
    claims: Claims,
    stopping: threading.Event,
    elsewhere: Callable[[int], None] = lambda pictures: None,
) -> Iterator[Shard | None]:
    """Shards that this worker has claimed, until all of the job are done, whoever did them.

    Args:
      elsewhere: called with how many pictures are done of which none was in these shards.

    Yields None where there is nothing to take at the moment.
    """
    description = job.describe()
    names, seen, ours, pictures = folder.names(description), set(), set(), 0
    while not stopping.is_set():
        finished = folder.done(store)
        pictures += sum(folder.pictures_of(description, int(name)) for name in finished - seen - ours)
        seen |= finished
        elsewhere(pictures)
        names = [name for name in names if name not in finished]
        others = [name for name in names if not claims.has(name)]
        if not others and not names:
            return
        name = claims.take_first(others)
        if name is None:
            yield None
            stopping.wait(POLL)
        elif folder.is_done(store, name):  # finished between the two looks
            claims.release(name)
        else:
            ours.add(name)
            yield job.shard(int(name))


class Planning:
    """How far the plan is: a line now and then, where there are many rows, or a slow disk with pictures."""

    def __init__(self, total: int):
        self._total, self._told = total, time.monotonic()

    def step(self, rows: int) -> None:
        cli.stop_if_asked()
        if (now := time.monotonic()) - self._told > LINE_EVERY:
            self._told = now
            cli.tell(f"looked at {rows} of {self._total} rows")


class Progress:
    """How far the job is, and how fast: a bar, or now and then a line."""

    def __init__(self, total: int, done: int):
        """Args:
        total: pictures of the job or of this worker's part of it, and rows that cannot be drawn.
        done: those that were done before.
        """
        self._total, self._before, self._elsewhere, self._mine = total, done, done, 0
        self._began = self._told = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=" images",
            dynamic_ncols=True,
            disable=None,  # where stderr is no terminal
            file=sys.stderr,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def elsewhere(self, pictures: int) -> None:
        """So many are done but for those of `step`: before, and by other workers since. For any thread."""
        self._elsewhere = pictures

    def step(self, pictures: int) -> None:
        """So many more. Here the program also stops, if asked to."""
        cli.stop_if_asked()
        self._mine += pictures
        done = self._elsewhere + self._mine
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._told > LINE_EVERY:
            self._told = now
            others = self._elsewhere - self._before
            rate, of_all = self.rate(), self.rate(others)
            fast = f"{rate:.3g} images/s" + (f" ({of_all:.3g} with other workers)" if others else "")
            left = f", {(self._total - done) / of_all:.0f} s left" if of_all else ""
            cli.tell(f"{done}/{self._total} images, {fast}{left}")

    def rate(self, others: int = 0) -> float:
        """Pictures a second of this worker, and of others that have made so many meanwhile."""
        return (self._mine + others) / max(time.monotonic() - self._began, 1e-9)
