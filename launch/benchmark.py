"""Measures how fast this is, and what holds it.

  python -m launch.benchmark generate [--model sd15 --side 256 --batch_sizes 1,4] [--peer diffusers]
  python -m launch.benchmark train    [--model sd15 --side 256] [--peer diffusers]
  python -m launch.benchmark spare    [--steps 30 --batch_sizes 4]
  python -m launch.benchmark scale    [--devices 1,2,4,8]
  python -m launch.benchmark load     [--model sd15]
  python -m launch.benchmark compile  --model sd15 --batch_sizes 8 --topology v5e:2x4

generate draws pictures: what the compiler takes, the first call, images/s and steps/s from then on, TFLOP/s,
and the share of the device's peak (MFU) where that is known. train does steps of training the U-Net. spare
draws the same pictures with less work, such as guidance in part of the steps: how much faster, and how far
from the pictures of all the work. scale draws with the same work for each of a growing number of devices.
load brings a folder's weights onto the devices, beside reading and copying as many bytes. compile runs
nothing: it compiles the programs for TPUs (pip install libtpu), and prints what they take and the least time
that this takes, by arithmetic, memory and links.

A peer draws, or trains, with the same random weights from the same latents in turn, A B A B; its pictures
must be the same. Ratios are the median over the rounds, and in brackets the least and the most.

Exit code: 0 done; 1 the peer's pictures are others; 2 a mistake, explained in one line; 130 stopped.
"""

import dataclasses
import gc
import itertools
import os
from collections.abc import Sequence
from typing import Any

from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What": {
        "model": (
            "NAME",
            "sd15, sd21, sdxl or tiny, with random weights; or a folder.\n"
            "Without it the model in the package",
        ),
        "side": ("N,N", "pixels of a side; without it the size that the model was made for"),
        "batch_sizes": ("N,N", "pictures a device"),
        "steps": ("N,N", "of the sampler"),
        "sampler": ("NAME", "without it the one that the model names"),
        "guidance_scale": ("X", "1: no guidance, half the work"),
        "dtype": ("TYPE", "float32 or bfloat16"),
        "parallel": ("MODE", "shard_map, jit or pmap"),
    },
    "How": {
        "rounds": ("N", "how often each is timed"),
        "peer": ("NAME", "diffusers: PyTorch's, eager; diffusers-compiled: with torch.compile, too"),
        "devices": ("N,N", "for scale, on how many; CPUs count as many as XLA is told to"),
    },
    "For compile": {
        "topology": ("NAME", "v5e:2x4, v6e:2x2, ..."),
        "parts": (
            "NAME,NAME",
            "some of text, unet (one call), sampler (a step with guidance), decoder, upscaler (one picture,\n"
            "by a network of RealESRGAN_x4plus's shape), train",
        ),
        "remat": ("NAME", "for train: none, dots or blocks"),
        "quantize": ("TYPE", "for drawing: int8 or fp8"),
        "merge_tokens": ("S", "for drawing: share of the tokens that attend together with others"),
        "controlnets": ("N", "for drawing: so many beside the U-Net, in the sampler's step"),
        "split_params": ("", "for drawing: the model over the chips, as train has it, not a copy on each"),
    },
    "Where": {
        "out": ("FILE", "all of it as JSON, with the command, the day and the hardware"),
        "plot": ("FILE", "a .png of seconds an image against batch size, pixels, steps or devices"),
    },
}
DEFAULTS: dict[str, Any] = {
    "model": "shipped",
    "batch_sizes": "1",
    "steps": "20",
    "guidance_scale": 5.0,
    "dtype": "float32",
    "parallel": "shard_map",
    "rounds": 5,
    "peer": "",
    "devices": "1,2,4,8",
    "topology": "v5e:2x2",
    "parts": "unet,sampler,decoder",
    "remat": "none",
    "quantize": "",
    "merge_tokens": 0.0,
    "controlnets": 0,
    "split_params": False,
}
KINDS = {name: type(value) for name, value in DEFAULTS.items()}
KINDS |= {"side": str, "sampler": str, "out": str, "plot": str}
PEERS = ("diffusers", "diffusers-compiled")
DRAWING = ("side", "batch_sizes", "steps", "sampler", "guidance_scale", "dtype", "parallel", "rounds")
OF_COMPILE = ("topology", "parts", "quantize", "merge_tokens", "controlnets", "split_params")
# mode -> the flags that it reads, beside model, out and plot
READ = {
    "generate": (*DRAWING, "peer"),
    "train": ("side", "batch_sizes", "dtype", "remat", "rounds", "peer"),
    "spare": DRAWING,
    "scale": (*DRAWING, "devices"),
    "load": ("dtype", "parallel", "rounds"),
    "compile": ("side", "batch_sizes", "remat", *OF_COMPILE),
}
MODES = tuple(READ)


def main(argv: Sequence[str]) -> int:
    """From the command line to a table; returns the exit code."""
    mode, *rest = argv if argv and not argv[0].startswith("-") else ("generate", *argv)
    if mode not in MODES:
        raise UserError(f"{mode!r} is nothing to measure: write {', '.join(MODES[:-1])} or {MODES[-1]}")
    options = cli.options(rest, __doc__, FLAGS, KINDS, DEFAULTS, {}, "model")
    if options is None:
        return cli.DONE
    if options["rounds"] < 1:
        raise UserError(f"rounds={options['rounds']}: write a number from 1")
    check_read(mode, rest)
    several = any("," in str(options.get(name) or "") for name in ("batch_sizes", "side", "steps"))
    if options.get("plot") and (mode in ("load", "compile") or (mode != "scale" and not several)):
        raise UserError("plot: nothing changes; write several batch_sizes, sides, steps or devices")
    jobs = {"generate": generate, "train": train, "spare": spare, "scale": scale, "load": load}
    jobs["compile"] = compile_programs
    return jobs[mode](options, argv)


def check_read(mode: str, argv: Sequence[str]) -> None:
    """UserError for a flag in `argv` that the mode does not read."""
    _, given = cli.parse(argv, KINDS) or ([], {})
    foreign = [name for name in given if name not in ("model", "out", "plot", *READ[mode])]
    if not foreign:
        return
    if (name := foreign[0]) in OF_COMPILE:
        spared = name in ("quantize", "merge_tokens")
        raise UserError(f"{name} is for compile{'; spare measures what it does to pictures' * spared}")
    why = ", which is bfloat16 and guided" if mode == "compile" and name in DRAWING[2:-1] else ""
    raise UserError(f"{name} is not for {mode}{why}: leave it out")


def generate(options: dict[str, Any], argv: Sequence[str]) -> int:
    sizes, peers = sizes_of(options), peers_of(options["peer"])
    from engine.benchmark import drawing, models

    asked, cases, found = asked_of(options), [drawing.Case(*each) for each in sizes], []
    with models.folder_of(options["model"]) as folder:
        for row in drawing.rows(folder, asked, cases, peers):
            found.append({"model": options["model"], **row})
            size = f"batch {row['batch']}, {row['pixels']} px, {row['steps']} steps"
            cli.tell(f"{size}: {row['images/s']:.3g} images/s")
    code = tell(found, options, argv)
    for row in found:
        for name in peers:
            if asked.dtype == "float32" and row[f"dB to {name}"] < drawing.ALIKE:
                cli.tell(f"batch {row['batch']}: {name} draws other pictures, {row[f'dB to {name}']:.1f} dB")
                code = cli.FAILED
    return code


def train(options: dict[str, Any], argv: Sequence[str]) -> int:
    sizes, peers = numbers(options["batch_sizes"], "batch_sizes"), peers_of(options["peer"])
    (side,) = numbers(options["side"], "side", most=1) if options.get("side") else (None,)
    from engine.benchmark import models, training

    found, how = [], (side, options["dtype"], options["remat"], options["rounds"])
    with models.folder_of(options["model"]) as folder:
        for row in training.rows(folder, sizes, *how, peers):
            found.append({"model": options["model"], **row})
            cli.tell(f"batch {row['batch']}: {row['images/s']:.3g} images/s")
    return tell(found, options, argv)


def spare(options: dict[str, Any], argv: Sequence[str]) -> int:
    sizes = sizes_of(options)
    from engine.benchmark import drawing, models, sparing

    with models.folder_of(options["model"]) as folder:
        cases = [drawing.Case(*each) for each in sizes]
        found = [{"model": options["model"], **row} for row in sparing.rows(folder, asked_of(options), cases)]
    return tell(found, options, argv)


def scale(options: dict[str, Any], argv: Sequence[str]) -> int:
    sizes, counts = sizes_of(options), numbers(options["devices"], "devices")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={max(counts)}"
    from engine.benchmark import drawing, models, scaling

    asked, found = asked_of(options), []
    with models.folder_of(options["model"]) as folder:
        for each in sizes:
            found += scaling.rows(folder, asked, drawing.Case(*each), counts)
            gc.collect()  # a pipeline and its programs are a cycle
    return tell([{"model": options["model"], **row} for row in found], options, argv)


def load(options: dict[str, Any], argv: Sequence[str]) -> int:
    from engine.benchmark import loading, models

    with models.folder_of(options["model"]) as folder:
        found = loading.row(folder, options["dtype"], options["parallel"], options["rounds"])
    return tell([{"model": options["model"], **found}], options, argv)


def asked_of(options: dict[str, Any]) -> Any:
    from engine.benchmark.drawing import Asked

    return Asked(**{field.name: options.get(field.name) for field in dataclasses.fields(Asked)})


def peers_of(name: str) -> list[str]:
    """A compiled peer comes with the plain one."""
    if name not in ("", *PEERS):
        raise UserError(f"peer={name!r} is unknown; write {' or '.join(PEERS)}")
    return list(PEERS[: PEERS.index(name) + 1]) if name else []


def sizes_of(options: dict[str, Any]) -> list[tuple[int, int | None, int]]:
    """Every batch size with every side and number of steps."""
    sides: list[int | None] = [None]
    if options.get("side"):
        sides = [*numbers(options["side"], "side")]
    batches, steps = numbers(options["batch_sizes"], "batch_sizes"), numbers(options["steps"], "steps")
    return list(itertools.product(batches, sides, steps))


def numbers(text: str, flag: str, most: int | None = None) -> list[int]:
    """Of "1,4,16": numbers from 1, at most `most` of them."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if min(found, default=0) < 1:
        raise UserError(f"{flag}={text!r}: write whole numbers from 1 with commas between, such as 1,4,16")
    if most and len(found) > most:
        raise UserError(f"{flag}={text!r}: here write one number")
    return found


def compile_programs(options: dict[str, Any], argv: Sequence[str]) -> int:
    from engine.benchmark import tpu_compiler

    sizes, parts = numbers(options["batch_sizes"], "batch_sizes"), options["parts"].split(",")
    (side,) = numbers(options["side"], "side", most=1) if options.get("side") else (None,)
    if options["remat"] != DEFAULTS["remat"] and "train" not in parts:
        raise UserError(f"remat={options['remat']!r} is for train: write it among --parts, too")
    tpu_compiler.prepare()  # before JAX comes
    from engine.benchmark import compiling

    found = []
    for row in compiling.rows(
        options["model"],
        options["topology"],
        sizes,
        side,
        parts,
        options["remat"],
        options["quantize"],
        options["merge_tokens"],
        options["split_params"],
        options["controlnets"],
    ):
        found.append(row)
        cli.tell(f"{row['program']}: compiled in {row['_compile seconds']:.0f} s")
    return tell(found, options, argv)


def tell(rows: Sequence[Any], options: dict[str, Any], argv: Sequence[str]) -> int:
    """The table, and the files that were asked for."""
    from engine.benchmark import report

    for line in report.table(rows).splitlines():
        cli.say(line)
    try:
        if options.get("out"):
            report.write(options["out"], argv, rows)
        if options.get("plot"):
            from engine.benchmark.plot import plot

            plot(options["plot"], rows)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror or error}") from None
    return cli.DONE


if __name__ == "__main__":
    cli.main(main)
