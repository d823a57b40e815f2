"""The run of launch.generate, once its flags are read: load, plan, draw, and say what happens."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

import engine
from engine.config import PICTURED, GenerateConfig
from engine.jobs import pictures
from engine.jobs.account import out_of_memory_or_raise
from engine.parallel import SPLIT, Devices
from engine.pipeline import Pipeline
from engine.text.prompts import unread
from engine.types import UserError
from launch import cli
from launch.progress import Progress

HALF = "--dtype bfloat16"
SHEET_IMAGES = 256  # on a contact sheet, at most
# Files that pictures are drawn with beside the model, in words
WHAT = {"lora": "LoRA", "embedding": "embedding", "decoder": "decoder", "refiner": "refiner"}
WHAT |= {
    "upscaler": "upscaler",
    "image": "picture",
    "mask": "mask",
    "safety_checker": "safety checker",
    "controlnet": "ControlNet",
    "control_image": "control picture",
    "ip_adapter": "IP-Adapter",
    "image_encoder": "image encoder",
    "image_prompt": "image prompt",
}
FOLDERS = ("decoder", "refiner", "controlnet", "image_encoder", "safety_checker")
# Flags by which other pixels of the same file are seen, or other files.
_SIZES = ("height", "width", "model", "image", "hires")
MADE_OTHERWISE_BY = dict.fromkeys(("image", "mask", "control_image"), _SIZES)
MADE_OTHERWISE_BY |= {"image_encoder": ("ip_adapter", "model")}
MADE_OTHERWISE_BY |= {"image_prompt": ("ip_adapter", "image_encoder", "model")}


def run(given: dict[str, Any], like: str | None = None) -> int:
    """Draws pictures; returns the exit code.

    Args:
      given: options of GenerateConfig.
      like: a picture whose settings stand in for what is not given.
    """
    cli.stop_if_asked()
    config = make_config(given, like)
    pipe = open_model(config)
    plan = pictures.plan(config, pipe)
    tell_what_is_chosen_or_left_out(config, plan, pipe)
    if like is not None:
        tell_what_has_changed(like, given, plan)
    drawn = draw(plan, pipe)
    write_sheet(plan, drawn)
    return cli.DONE if all(picture.files for picture in drawn) else cli.FAILED


def make_config(given: dict[str, Any], like: str | None) -> GenerateConfig:
    """The config, from what is given and what the picture `like` remembers."""
    if like is None:
        return GenerateConfig(**given)
    options, version = pictures.remembered(os.path.expanduser(like))
    if version != engine.__version__:
        cli.tell(
            f"warning: {like} was drawn by fogsculpt {version}; "
            f"this is {engine.__version__}, which may draw it a little differently"
        )
    if given.get("controlnet") == "":  # without it, then
        options = {name: value for name, value in options.items() if not name.startswith("control_")}
    if given.get("ip_adapter") == "":
        theirs = ("image_prompt", "image_encoder", "ip_adapter_layers")
        options = {name: value for name, value in options.items() if name not in theirs}
    config = GenerateConfig(**options | given)
    if "model" not in given and not (is_shipped(config) or os.path.isdir(os.path.expanduser(config.model))):
        raise UserError(
            f"{like} was drawn by the model {config.model}, which is not here; write --model FOLDER"
        )
    files = {"lora": [file for file, _ in config.loras()], "embedding": config.embeddings()}
    for of, pictured in PICTURED.items():
        files |= {of: [path for path, _ in config.networks(of)], pictured.picture: config.pictures_of(of)}
    files |= {name: [path] for name in WHAT if name not in files and (path := getattr(config, name))}
    for name, what in WHAT.items():
        for file in () if name in given else files.get(name, ()):
            if not os.path.exists(os.path.expanduser(file)):
                kind = "FILE" if name not in FOLDERS or file.endswith(".safetensors") else "FOLDER"
                raise UserError(
                    f"{like} was drawn with the {what} {file}, which is not here; write --{name} {kind}"
                )
    return config


def is_shipped(config: GenerateConfig) -> bool:
    """Whether the model is the one in the package."""
    return config.model == GenerateConfig.model


def open_model(config: GenerateConfig, all_hosts: bool = False) -> Pipeline:
    """Loads the model onto the devices: of this process, or of all hosts together."""
    parallel: str | Devices = config.parallel
    if config.split_params:
        parallel = Devices(config.parallel, rules=SPLIT, all_hosts=all_hosts)
    with advice_where_memory_runs_out(HALF, "--parallel jit --split_params"):
        model = None if is_shipped(config) else config.model
        files = config.loras(), config.embeddings(), config.decoder or None, config.tile
        options = config.refiner or None, config.quantize, config.clip_skip, config.controlnets()
        more = config.prompt_weights, config.long_prompts, config.upscaler or None
        readers = config.ip_adapters(), config.image_encoder or None, config.adapter_layers()
        readers = *readers, config.safety_checker or None, config.control_modes(), config.judge or None
        pipe = engine.load(model, config.dtype, parallel, *files, *options, *more, *readers)
    cli.stop_if_asked()
    return pipe


def tell_what_is_chosen_or_left_out(config: GenerateConfig, plan: pictures.Plan, pipe: Pipeline) -> None:
    """The fresh seed, and what the model will not read of the prompts."""
    if config.seed is None:
        cli.tell(f"seed {plan.config.seed}")
    for warning in unread([*plan.prompts, config.negative_prompt], pipe.model.first_tokenizer, pipe.reading):
        cli.tell(f"warning: {warning}")


def tell_what_has_changed(like: str, given: dict[str, Any], plan: pictures.Plan) -> None:
    """The files that have the names of those that the picture was drawn with, and are others."""
    for name, mark in pictures.remembered_contents(os.path.expanduser(like)).items():
        flag = "model" if name == "weights" else name
        others = {flag, *MADE_OTHERWISE_BY.get(name, ())}
        if not others.isdisjoint(given) or plan.contents.get(name) == mark:
            continue
        what, file = WHAT.get(name, "model"), getattr(plan.config, flag, "")
        changed = file or f"that of {plan.config.ip_adapter}"  # the image encoder that lies beside it
        cli.tell(f"warning: {like} was drawn with another {what}: {changed} has changed since")


def draw(plan: pictures.Plan, pipe: Pipeline) -> list[pictures.Drawn]:
    """Draws and writes the pictures, prints the paths of the files, and tells which could not be drawn."""
    settings = plan.settings
    steps = pipe.steps_of(settings)
    half = settings.batch_size // 2
    lower = "--hires" if settings.larger else "--height and --width"
    smaller = f"--batch_size {half}" if half else f"--tile 512, or a smaller {lower}"
    if plan.config.upscaler and not plan.config.tile:  # it takes one picture after another, of any batch
        smaller = f"--tile 512, or {smaller.removeprefix('--tile 512, or ')}"
    shown = bool(plan.stages) or plan.config.words
    counts = [len(batch) for batch in pictures.batches(plan, pipe)]
    progress = Progress(counts, [steps * pipe.passes_of(count, settings, shown) for count in counts])
    drawn = []
    try:
        with advice_where_memory_runs_out(smaller, HALF), progress:
            for picture in pictures.draw(plan, pipe, progress.step):
                room = len(drawn) < SHEET_IMAGES  # a long run must not keep all its pictures in memory
                drawn.append(picture if room else picture._replace(image=None))
                tell_of(picture, plan.config)
                cli.stop_if_asked()
    except KeyboardInterrupt as stop:
        done = sum(bool(picture.files) for picture in drawn)
        where = f"{done} of {len(plan.prompts)} pictures are in {plan.folder}"
        raise type(stop)(where) from None
    return drawn


def tell_of(picture: pictures.Drawn, config: GenerateConfig) -> None:
    """Where the picture is, or that it could not be drawn."""
    for file in picture.files:
        cli.say(str(file))
    if picture.files and picture.score is not None:
        chosen = f", the best of {config.candidates}" if config.candidates > 1 else ""
        cli.tell(f"{picture.files[0].name}: CLIP score {picture.score:.2f}{chosen}")
    if picture.held_back:
        where = f"picture {picture.index} of seed {config.seed}"
        cli.tell(f"{where} was held back by the safety checker, and not written")
    elif not picture.files:
        advice = "a smaller --guidance_scale" if config.dtype == "float32" else "--dtype float32"
        cli.tell(
            f"error: picture {picture.index} of seed {config.seed} met a NaN or an infinity "
            f"and was not written; write {advice}"
        )


def write_sheet(plan: pictures.Plan, drawn: list[pictures.Drawn]) -> None:
    """Puts several pictures on a contact sheet, too."""
    shown = [picture for picture in drawn if picture.image is not None]
    if len(shown) < 2:
        return
    path = pictures.write_sheet(plan, shown)
    cli.say(str(path))
    if len(drawn) > SHEET_IMAGES:
        cli.tell(f"{path.name} shows the first {SHEET_IMAGES} pictures")


@contextlib.contextmanager
def advice_where_memory_runs_out(*ways: str) -> Iterator[None]:
    """Turns the devices' and the host's out-of-memory into a UserError that says what to write."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        out_of_memory_or_raise(error)
        if jax.default_backend() == "cpu":  # which stores bfloat16 beside the float32 that it computes with
            ways = tuple(way for way in ways if way != HALF)
        raise UserError(f"out of memory; write {', or '.join(ways)}") from None
