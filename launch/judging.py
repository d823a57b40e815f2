"""The run of launch.evaluate for FID and CLIP score, once its flags are read."""

import contextlib
import datetime
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import engine
from engine import finish
from engine.evaluate import frechet
from engine.evaluate.clip_score import ClipScorer
from engine.evaluate.fid import Features
from engine.evaluate.quality import Instruments, Quality, check_reference, measure
from engine.evaluate.sheet import sheet
from engine.text.rows import read_rows, unread_columns
from engine.types import UserError
from launch import captioned, cli, quality
from launch.bulk import Progress
from launch.drawing import HALF, advice_where_memory_runs_out, open_model

REPORT, SHEET = "evaluation.json", "best-and-worst.png"


def run(given: Mapping[str, Any]) -> int:
    """Measures pictures, or takes the statistics of a reference alone; returns the exit code."""
    cli.stop_if_asked()
    with contextlib.ExitStack() as stack:
        stack.enter_context(advice_where_memory_runs_out("a smaller --batch_size", HALF))
        judges = "prompts_file" in given or "pictures" in given
        out = prepare_places(given, judges)
        instruments = open_instruments(given)
        cli.stop_if_asked()
        pictures = open_pictures(given, stack) if judges else None
        if pictures is not None and instruments.features is not None and pictures.count < 2:
            raise UserError("FID needs 2 pictures or more; there is 1")
        instruments = with_reference(given, instruments)
        if pictures is None or out is None:
            return cli.DONE
        for warning in pictures.warnings:
            cli.tell(f"warning: {warning}")
        with Progress(pictures.count, 0) as progress:
            found = measure(pictures.batches, instruments, progress.step)
        tell(found, pictures, instruments, given)
        write(out, found, pictures, instruments, given)
    return cli.DONE


# ---- before the first picture


def prepare_places(given: Mapping[str, Any], judges: bool) -> pathlib.Path | None:
    """The folder to write into; UserError where that cannot be, or what is to be read is not there."""
    reference = os.path.expanduser(given.get("reference", ""))
    if reference and not os.path.isdir(reference) and not quality.is_npz(reference):
        raise UserError(f"no folder {reference}: write a folder of pictures, or .npz with mu and sigma")
    if "save_reference" in given:
        finish.prepare_folder(os.path.dirname(os.path.expanduser(given["save_reference"])) or ".")
    return finish.prepare_folder(os.path.expanduser(given.get("out", quality.OUT))) if judges else None


def open_instruments(given: Mapping[str, Any]) -> Instruments:
    """What is named by flags, all but a reference that has to be taken from pictures."""
    reference = None
    if "reference" in given and not os.path.isdir(os.path.expanduser(given["reference"])):
        reference = frechet.load(given["reference"])
        check_reference(reference)
    features = Features(given["inception"]) if "inception" in given else None
    return Instruments(features, reference, ClipScorer(given["clip"]) if "clip" in given else None)


def open_pictures(given: Mapping[str, Any], stack: contextlib.ExitStack) -> captioned.Captioned:
    """The pictures to judge, of which none is drawn yet. `stack`: closes what they need."""
    if "pictures" in given:
        how = given.get("kind", "auto"), given.get("caption_field", "")
        return captioned.found(given["pictures"], *how, need_captions="clip" in given)
    config = quality.drawing_config(given)
    rows = stack.enter_context(read_rows(config.prompts_file, cli.stdin()))
    for warning in unread_columns(rows.columns):
        cli.tell(f"warning: {warning}")
    return captioned.drawn(config, rows, given.get("num_prompts"), open_model(config))


def with_reference(given: Mapping[str, Any], instruments: Instruments) -> Instruments:
    """The instruments, the statistics of a folder of real pictures among them."""
    if instruments.features is None or instruments.reference is not None:
        return instruments
    reference = instruments.features.folder_moments(given["reference"], cli.stop_if_asked)
    check_reference(reference)
    if "save_reference" in given:
        try:
            frechet.save(given["save_reference"], reference)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{given['save_reference']} cannot be written: {reason}") from None
        cli.say(given["save_reference"])
    return instruments._replace(reference=reference)


# ---- after the last


def tell(
    found: Quality, pictures: captioned.Captioned, instruments: Instruments, given: Mapping[str, Any]
) -> None:
    """The table on stdout, and warnings."""
    for warning in warnings_of(found, pictures):
        cli.tell(f"warning: {warning}")
    cli.say(f"pictures      {found.pictures}")
    if found.fid is not None and instruments.reference is not None:
        against = f"{instruments.reference.n or 'the'} pictures of {cli.one_line(given['reference'])}"
        cli.say(f"FID           {found.fid:.3f}  against {against}")
    if found.clip_score is not None and instruments.clip is not None:
        error = "" if found.clip_error is None else f" +- {found.clip_error:.3f}"
        cli.say(f"CLIP score    {found.clip_score:.3f}{error}  by {cli.one_line(given['clip'])}")
        cli.say(f"captions cut  {found.truncated} at {instruments.clip.tokenizer.model_max_length} tokens")


def warnings_of(found: Quality, pictures: captioned.Captioned) -> list[str]:
    """What became clear on the way."""
    struck = pictures.count - found.pictures
    told = [f"a NaN or an infinity struck {struck} pictures, which are left out"] if struck else []
    return [*told, *found.shortages]


def write(
    out: pathlib.Path,
    found: Quality,
    pictures: captioned.Captioned,
    instruments: Instruments,
    given: Mapping[str, Any],
) -> None:
    """evaluation.json, and the sheet where there are scores to go by."""
    finish.write_text(out / REPORT, json.dumps(report(found, pictures, instruments, given), indent=2) + "\n")
    cli.say(str(out / REPORT))
    if found.best:
        rows = [(one.picture, f"{one.score:.1f}  {one.caption}") for one in (*found.best, *found.worst)]
        headings = {len(found.best): "Worst by CLIP score", 0: "Best by CLIP score"}
        page = np.asarray(sheet(rows, headings))
        names = [one.number for one in (*found.best, *found.worst)]
        finish.write_png(out / SHEET, page, {"sheet": names, "version": engine.__version__})
        cli.say(str(out / SHEET))


def report(
    found: Quality, pictures: captioned.Captioned, instruments: Instruments, given: Mapping[str, Any]
) -> dict[str, Any]:
    """All that one needs to compare the figures with others."""
    devices = jax.local_devices()
    numbers: dict[str, Any] = {"pictures": found.pictures, "left_out": pictures.count - found.pictures}
    settings = dict(pictures.about)
    if instruments.features is not None and instruments.reference is not None:
        numbers |= {"fid": found.fid, "reference_pictures": instruments.reference.n}
        settings |= {name: given[name] for name in ("inception", "reference")}
    if instruments.clip is not None:
        numbers |= {"clip_score": found.clip_score, "clip_score_standard_error": found.clip_error}
        numbers |= {"captions_cut": found.truncated, "tokens": instruments.clip.tokenizer.model_max_length}
        settings |= {"clip": given["clip"]}
    return {
        **numbers,
        "warnings": [*pictures.warnings, *warnings_of(found, pictures)],
        "settings": settings,
        "versions": {"fogsculpt": engine.__version__, "jax": jax.__version__},
        "devices": {"kind": devices[0].device_kind, "count": len(devices)},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
