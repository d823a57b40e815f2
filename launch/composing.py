"""The run of launch.evaluate on a model of the drawn world, once its flags are read."""

import datetime
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import engine
from engine import finish, loading, pipeline
from engine.config import GenerateConfig
from engine.evaluate import composing, neighbours, reader
from engine.evaluate.sheet import sheet
from engine.types import Params, UserError
from engine.world.drawing import MULTIPLE
from launch import cli
from launch.bulk import Progress

SHIPPED = GenerateConfig.model  # the word for what is in the package
COLUMNS = ("things", "colour", "count", "relation", "place", "background", "time", "style", "all")
REPORT, SHEET, NEAREST = "evaluation.json", "best-and-worst.png", "neighbours.png"
SHOWN = 8  # best pictures, and worst ones
SAMPLES, AMONG, EACH = 16, 20_000, 3  # held against so many pictures of the training; so many are shown


def run(options: Mapping[str, Any]) -> int:
    """Draws all groups of prompts, and says how often what they state is seen; returns the exit code."""
    named = options["probe"]
    probe = reader.load(reader.SHIPPED if named == SHIPPED else pathlib.Path(os.path.expanduser(named)))
    out = finish.prepare_folder(os.path.expanduser(options["out"]))
    loras = GenerateConfig(lora=options["lora"]).loras()
    pipe = loading.load(None if options["model"] == SHIPPED else options["model"], lora=loras)
    how = {name: options[name] for name in ("sampler", "steps", "guidance_scale", "batch_size")}
    pipe.settings(**how)  # a wrong one is said before anything is drawn
    height, width = pipe.model.default_size
    if height != width or height % MULTIPLE:
        raise UserError(
            f"this model draws {width} x {height} px, and no scenes: they are squares of a multiple of "
            f"{MULTIPLE}; its pictures can be measured with --clip or --inception"
        )
    drawn = draw(pipe, probe, options, how)
    like = composing.likeness(probe, drawn)
    tell(composing.table(drawn), like)
    write(out, drawn, like, options)
    show_nearest(out, probe, drawn, options["train_seed"])
    return cli.DONE


def draw(
    pipe: pipeline.Pipeline, probe: Params, options: Mapping[str, Any], how: Mapping[str, Any]
) -> list[composing.Drawn]:
    """All groups, with one bar for all."""
    n, groups = options["num_prompts"], [*composing.groups()]
    with Progress(n * len(groups), 0) as progress:

        def report(count: int) -> None:
            cli.stop_if_asked()
            progress.step(count)

        return [
            composing.draw(pipe, probe, *group, n, options["seed"], report=report, **how) for group in groups
        ]


def tell(table: composing.Table, like: composing.Likeness) -> None:
    """The tables on stdout: a row for each kind of prompts, in per cent; what was not asked is empty."""
    cli.say(" " * 19 + "".join(f"{column:>11}" for column in COLUMNS))
    say_rows(table)
    cli.say("renders of the same scenes, whatever the probe misses in them:")
    say_rows(like.table)
    cli.say(f"Frechet distance to renders: {like.pictures:.2f}; of other renders: {like.renders:.2f}")


def say_rows(table: composing.Table) -> None:
    for name, shares in table.items():
        cells = (f"{shares[column]:.1%}" if column in shares else "" for column in COLUMNS)
        cli.say(f"{name:19}" + "".join(f"{cell:>11}" for cell in cells).rstrip())


def write(
    out: pathlib.Path,
    drawn: Sequence[composing.Drawn],
    like: composing.Likeness,
    options: Mapping[str, Any],
) -> None:
    """evaluation.json and the sheet."""
    devices = jax.local_devices()
    report = {
        "prompts": options["num_prompts"],
        "table": composing.table(drawn),
        "renders": like.table,
        "frechet_distance": {"pictures": like.pictures, "renders": like.renders},
        "settings": dict(options),
        "versions": {"fogsculpt": engine.__version__, "jax": jax.__version__},
        "devices": {"kind": devices[0].device_kind, "count": len(devices)},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    finish.write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    cli.say(str(out / REPORT))
    every = [(sure, each, i) for each in drawn for i, sure in enumerate(each.sureness)]
    every.sort(key=lambda one: one[0], reverse=True)
    chosen = [*every[:SHOWN], *every[: -SHOWN - 1 : -1]]
    rows = [(each.images[i], each.prompts[i]) for _, each, i in chosen]
    headings = {SHOWN: "What the probe misses most", 0: "What the probe is surest of"}
    save(out / SHEET, sheet(rows, headings if len(every) >= SHOWN else {0: headings[0]}))


def show_nearest(out: pathlib.Path, probe: Params, drawn: Sequence[composing.Drawn], seed: int) -> None:
    """Samples of all groups, each with the nearest pictures of the training with `seed` beside it."""
    turns = itertools.zip_longest(*([(each, i) for i in range(len(each.scenes))] for each in drawn))
    samples = [one for turn in turns for one in turn if one][:SAMPLES]
    images, scenes = zip(*((each.images[i], each.scenes[i]) for each, i in samples), strict=True)
    cli.tell(f"looking for the nearest of {AMONG:,} pictures of the training")
    with tqdm(unit=" images", dynamic_ncols=True, disable=None, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            cli.stop_if_asked()
            bar.total = total
            bar.update(done - bar.n)

        found = neighbours.nearest(probe, np.stack(images), scenes, seed, range(AMONG), EACH, report)
    rows = []
    for (each, i), own in zip(samples, found, strict=True):
        rows.append((each.images[i], f"drawn: {each.prompts[i]}"))
        rows += [(one.image, f"{one.distance:.1f}: {one.caption}") for one in own]
    save(out / NEAREST, sheet(rows, {0: "Drawn, and the nearest pictures of the training"}, columns=1 + EACH))


def save(path: pathlib.Path, page: Any) -> None:
    finish.write_png(path, np.asarray(page), {"sheet": [], "version": engine.__version__})
    cli.say(str(path))
