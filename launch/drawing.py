"""The run of launch.generate, once its flags are read: load, plan, draw, and say what happens."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

import engine
from engine.config import GenerateConfig
from engine.diffusion import samplers
from engine.jobs import pictures
from engine.pipeline import Pipeline
from engine.text.prompts import unread
from engine.types import UserError
from launch import cli
from launch.progress import Progress


def run(given: dict[str, Any], like: str | None = None) -> int:
    """Draws pictures; returns the exit code.

    Args:
      given: options of GenerateConfig.
      like: a picture whose settings stand in for what is not given.
    """
    cli.stop_if_asked()
    config = make_config(given, like)
    with advice_where_memory_runs_out(config):
        pipe = open_model(config)
        cli.stop_if_asked()
        plan = pictures.plan(config, pipe)
        tell_what_is_chosen_or_left_out(config, plan, pipe)
        drawn = draw(plan, pipe)
    write_sheet(plan, drawn)
    return cli.DONE if all(picture.files for picture in drawn) else cli.FAILED


def make_config(given: dict[str, Any], like: str | None) -> GenerateConfig:
    """The config, from what is given and what the picture `like` remembers."""
    if like is None:
        return GenerateConfig(**given)
    options, version = pictures.remembered(like)
    if version != engine.__version__:
        cli.tell(
            f"warning: {like} was drawn by fogsculpt {version}; "
            f"this is {engine.__version__}, which may draw it a little differently"
        )
    config = GenerateConfig(**options | given)
    if "model" not in given and not (is_shipped(config) or os.path.isdir(os.path.expanduser(config.model))):
        raise UserError(
            f"{like} was drawn by the model {config.model}, which is not here; write --model FOLDER"
        )
    return config


def is_shipped(config: GenerateConfig) -> bool:
    """Whether the model is the one in the package."""
    return config.model == GenerateConfig.model


def open_model(config: GenerateConfig) -> Pipeline:
    """Loads the model onto the devices."""
    return engine.load(None if is_shipped(config) else config.model, config.dtype, config.parallel)


def tell_what_is_chosen_or_left_out(config: GenerateConfig, plan: pictures.Plan, pipe: Pipeline) -> None:
    """The fresh seed, and what the model will not read of the prompts."""
    if config.seed is None:
        cli.tell(f"seed {plan.config.seed}")
    for warning in unread([*plan.prompts, config.negative_prompt], pipe.model.tokenizer):
        cli.tell(f"warning: {warning}")


def draw(plan: pictures.Plan, pipe: Pipeline) -> list[pictures.Drawn]:
    """Draws and writes the pictures, prints the paths of the files, and tells which could not be drawn."""
    steps = samplers.find(plan.settings.sampler).steps(plan.settings.steps)
    at_once = plan.settings.batch_size * pipe.devices.count
    drawn = []
    try:
        with Progress(len(plan.prompts), at_once, steps) as progress:
            for picture in pictures.draw(plan, pipe, progress.step):
                drawn.append(picture)
                for file in picture.files:
                    cli.say(str(file))
                if not picture.files:
                    cli.tell(
                        f"error: picture {picture.index} of seed {plan.config.seed} met a NaN or an infinity "
                        "and was not written; write --dtype float32, or a smaller --guidance_scale"
                    )
                cli.stop_if_asked()
    except KeyboardInterrupt:
        done = sum(bool(picture.files) for picture in drawn)
        where = f"{done} of {len(plan.prompts)} pictures are in {plan.folder}"
        raise KeyboardInterrupt(where) from None
    return drawn


def write_sheet(plan: pictures.Plan, drawn: list[pictures.Drawn]) -> None:
    """Puts several pictures on a contact sheet, too."""
    whole = [picture for picture in drawn if picture.files]
    if len(whole) > 1:
        cli.say(str(pictures.write_sheet(plan, whole)))


@contextlib.contextmanager
def advice_where_memory_runs_out(config: GenerateConfig) -> Iterator[None]:
    """Turns the devices' and the host's out-of-memory into a UserError that says what to try."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        smaller = "a smaller --batch_size" if config.batch_size != 1 else "a smaller --height and --width"
        raise UserError(f"out of memory; write {smaller}, or --dtype bfloat16") from None
