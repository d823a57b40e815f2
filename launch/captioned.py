"""Pictures with captions that are to be judged: drawn now, of a job, or of any folder or shards.

All that can be wrong with them is said before the first is drawn or decoded.
"""

import concurrent.futures
import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from engine.config import JobConfig
from engine.evaluate.quality import Batch
from engine.finish import BESIDE, SETTINGS_KEY
from engine.jobs import folder, formats
from engine.jobs.given import OfRows
from engine.jobs.plan import request
from engine.jobs.settling import Program, settle_with
from engine.jobs.store import Store, open_store
from engine.jobs.wording import Wording, Wordings
from engine.judging import arrived
from engine.pipeline import Pipeline
from engine.pixels import FORMATS, read_header
from engine.requests import Finished, Given
from engine.text.reading import Reading, said
from engine.text.rows import Rejected, Row, Rows
from engine.train.sources.finding import open_source
from engine.train.sources.item import Source, Unusable, caption_in, required
from engine.types import UserError
from launch import cli

POLL = 0.01  # seconds between looks at whether a batch is drawn
AT_ONCE = 64  # pictures that are read ahead of their measuring
ADVICE = "mend it, or take it out of the folder"


class Captioned(NamedTuple):
    """Pictures to come."""

    count: int  # that are expected; a NaN may strike some of those that are drawn
    batches: Iterator[Batch]
    about: dict[str, Any]  # which pictures these are, for JSON
    warnings: tuple[str, ...] = ()


# ---- drawn now


def drawn(config: JobConfig, rows: Rows, most: int | None, pipe: Pipeline) -> Captioned:
    """A picture of each row, as a job with this config draws them.

    Args:
      most: rows at most, from the first on.

    Raises:
      UserError: one of these rows cannot be drawn.
    """
    count = len(rows) if most is None else min(most, len(rows))
    settle, groups = settle_with(config, pipe), {}
    for number in range(count):
        row = rows[number]
        program = settle(row)
        if isinstance(program, str):
            raise UserError(f"{_named(config, row)} cannot be drawn: {program}")
        groups.setdefault(program, []).append(number)
    height, width = pipe.default_size
    options = (config.steps, config.sampler, config.guidance_scale, config.height, config.width)
    filled = pipe.settings(*options, **config.of_the_way())
    about = {name: getattr(config, name) for name in ("prompts_file", "model", "seed", "negative_prompt")}
    about |= {"prompts": count, "rows_sha256": rows.digest}
    about |= {"sampler": filled.sampler, "steps": config.steps, "guidance_scale": config.guidance_scale}
    about |= {"height": config.height or height, "width": config.width or width, "dtype": config.dtype}
    names = ("lora", "embedding", "decoder", "refiner", "clip_skip", "quantize", "tile")
    names += ("prompt_weights", "long_prompts", "upscaler")
    names += ("controlnet", "control_image", "control_kind", "control_mode")
    names += ("ip_adapter", "image_prompt", "image_encoder", "ip_adapter_layers", "judge")
    chosen = {name: getattr(config, name) for name in names} | config.of_the_way()
    chosen["refiner_start"] = filled.refiner_start
    about |= {name: value for name, value in chosen.items() if value}
    about |= {"parallel": config.parallel, "batch_size": sorted({p.settings.batch_size for p in groups})}
    return Captioned(count, _draw(config, rows, groups, pipe, settle.pictures), about)


def _named(config: JobConfig, row: Row | Rejected) -> str:
    return f"{config.prompts_file}: row {row.number} (id {row.id[:40]})"


def _draw(
    config: JobConfig,
    rows: Rows,
    groups: Mapping[Program, Sequence[int]],
    pipe: Pipeline,
    pictures: OfRows,
) -> Iterator[Batch]:
    """The devices draw the next batch while one is measured."""
    flying, wordings = None, Wordings(pipe)
    for program, numbers in groups.items():
        size = program.settings.batch_size * pipe.devices.count
        for first in range(0, len(numbers), size):
            part = [rows[number] for number in numbers[first : first + size]]
            words = [said(row.prompt, pipe.reading) for row in part]
            if flying is not None and not wordings.are_there(program.lora):
                yield _landed(*flying)  # what it was drawn with leaves the memory
                flying = None
            found = words, _dispatch(config, part, program, wordings.of(program.lora), pictures)
            if flying is not None:
                yield _landed(*flying)
            flying = found
    if flying is not None:
        yield _landed(*flying)


def _dispatch(
    config: JobConfig, rows: Sequence[Row], program: Program, wording: Wording, pictures: OfRows
) -> Finished:
    settings, requests = program.settings, [request(config, row, 0) for row in rows]
    if program.beside:
        given = [_given(config, row, pictures, *settings.size) for row in rows]
        requests = [one._replace(given=each) for one, each in zip(requests, given, strict=True)]
    return wording.pipe.dispatch(requests, wording.of(requests), settings)


def _given(config: JobConfig, row: Row, pictures: OfRows, height: int, width: int) -> Given:
    try:
        return pictures.read(row, height, width)
    except (UserError, OSError) as error:
        raise UserError(f"{_named(config, row)} cannot be drawn: {error}") from None


def _landed(words: Sequence[str], finished: Finished) -> Batch:
    """The pictures of a batch that no NaN struck, when they are there. Here the program also stops."""
    while not finished.finite.is_ready():
        cli.pause(POLL)
    cli.stop_if_asked()
    images, finite, *_ = arrived(finished, len(words))
    return images[finite], [told for told, sound in zip(words, finite, strict=True) if sound]


# ---- there already


def found(path: str, kind: str = "auto", field: str = "", need_captions: bool = True) -> Captioned:
    """Pictures that are there.

    Args:
      path: a job's folder, on s3:// or gs:// too; a folder of pictures; a shard, or a folder of them.
      kind, field: `kind` and `caption_field` of DataConfig, for all but a job's.
      need_captions: whether a picture without one is a mistake.

    Raises:
      UserError: there is nothing, or something that cannot be read.
    """
    if "://" in path or os.path.isfile(os.path.join(os.path.expanduser(path), "job.json")):
        return of_job(open_store(path, JobConfig.patience, cli.tell, writable=False, pause=cli.pause))
    with cli.data_by_flags(["kind"]):
        source = open_source(path, kind, field)
    places, captions = _looked_at(path, source, need_captions)
    return Captioned(len(places), _read(source, places, captions), {"pictures": path})


def of_job(store: Store) -> Captioned:
    """The pictures of all shards of a job that are done."""
    job = folder.read_job(store)
    done, there = folder.done(store), set(store.names("shards"))
    names = [name for name in folder.names(job) if name in done]
    count = failures = 0
    for name in names:
        cli.stop_if_asked()
        manifest = _manifest(store, name)
        count += len(manifest["pictures"])
        failures += manifest["failures"]
        if manifest["pictures"] and formats.path_of(manifest["format"], name).split("/")[1] not in there:
            raise UserError(
                f"{store.url}: the pictures of shard {name} are gone; remove its manifest, and the same "
                "command of launch.generate draws them again"
            )
    if not count:
        raise UserError(
            f"{store.url}: the job there has no picture yet; --status of launch.generate says more"
        )
    told = []
    if open_ := job["shards"] - len(names):
        told.append(f"{open_} of {job['shards']} shards of the job are not done: their pictures are left out")
    if failures:
        told.append(f"{failures} pictures or rows of the job could not be drawn, and are left out")
    about = {"pictures": store.url, "job": job["fingerprint"]}
    reading = Reading(*(bool(job["fingerprint"].get(name)) for name in ("prompt_weights", "long_prompts")))
    return Captioned(count, _shards(store, names, reading), about, tuple(told))


def _shards(store: Store, names: Sequence[str], reading: Reading) -> Iterator[Batch]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name in names:
            manifest = _manifest(store, name)
            facts = manifest["pictures"]
            try:
                pngs = formats.read_pngs(store, manifest["format"], name) if facts else iter(())
                for first in range(0, len(facts), AT_ONCE):
                    part = facts[first : first + AT_ONCE]
                    files = [next(pngs, b"") for _ in part]  # none: no picture, which the decoder says
                    where = [f"{store.url}: picture {one['number']} of shard {name}" for one in part]
                    words = [said(one["prompt"], reading) for one in part]
                    yield list(pool.map(_pixels, files, where)), words
                    cli.stop_if_asked()
            except (FileNotFoundError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{store.url}: {error}; --verify of launch.generate says more") from None


def _manifest(store: Store, name: str) -> dict[str, Any]:
    try:
        return folder.read_manifest(store, name)
    except ValueError as error:
        raise UserError(f"{store.url}/{error}; --verify of launch.generate says more") from None


def _looked_at(path: str, source: Source, need_captions: bool) -> tuple[list[int], list[str]]:
    """Which pictures of a source are to be judged, and their captions, from a look at each header."""
    places, captions, problems = [], [], []

    def look(i: int) -> str | Unusable | None:
        try:
            return _caption(source, i, need_captions)
        except Unusable as problem:
            return problem

    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a limit of our own
        for first in range(0, len(source), AT_ONCE):
            cli.stop_if_asked()
            some = range(first, min(first + AT_ONCE, len(source)))
            for i, caption in zip(some, pool.map(look, some), strict=True):
                if isinstance(caption, Unusable):
                    problems.append(f"{source.name(i)}: {caption}")
                elif caption is not None:
                    places.append(i)
                    captions.append(caption)
    if problems:
        each = "it" if len(problems) == 1 else f"these {len(problems)}"
        raise UserError(f"{problems[0]}; mend {each}, or take {each} out of {path}")
    if not places:
        raise UserError(f"{path}: no picture to judge, but sheets and strips of launch.generate")
    return places, captions


def _caption(source: Source, i: int, needed: bool) -> str | None:
    """Of one picture; None: it is a sheet or a strip of launch.generate. Raises Unusable."""
    item = source.read(i)
    with item.file as file:
        settings = _settings(read_header(file, SETTINGS_KEY).settings)
    if not BESIDE.isdisjoint(settings):
        return None
    caption = item.caption
    if caption is None:
        with contextlib.suppress(Unusable):
            caption = caption_in(settings, "prompt")
    return required(caption) if needed else caption or ""


def _settings(text: Any) -> dict[str, Any]:
    """What a picture of ours remembers; empty for others."""
    try:
        settings = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _read(source: Source, places: Sequence[int], captions: Sequence[str]) -> Iterator[Batch]:
    def read(i: int) -> np.ndarray:
        try:
            with source.read(i).file as file:
                return _pixels(file, source.name(i))
        except Unusable as problem:  # it has changed since it was looked at
            raise UserError(f"{source.name(i)}: {problem}; {ADVICE}") from None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for first in range(0, len(places), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            yield list(pool.map(read, places[some])), list(captions[some])
            cli.stop_if_asked()


def _pixels(file: bytes | io.BufferedIOBase, where: str) -> np.ndarray:
    """A picture as FID's and CLIP's own programs read it: not turned as its EXIF says, nor put on white."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises half a dozen types for broken files
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{where} cannot be read ({reason}): {ADVICE}") from None
