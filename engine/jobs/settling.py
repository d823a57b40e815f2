"""How each row of a job is drawn, or why it cannot be: by its options, pictures and LoRAs, and the model."""

import dataclasses
from typing import Any, NamedTuple

from engine import edits
from engine.config import MAX_INDEX, JobConfig
from engine.jobs import given
from engine.jobs.loras import LorasOfRows, Own
from engine.pipeline import Pipeline
from engine.requests import Settings
from engine.text.rows import Rejected, Row
from engine.types import UserError

LORA = " lora "  # before what tells LoRAs from others


class Program(NamedTuple):
    """What is compiled for a row, and with which weights it is drawn: rows with equal ones go together."""

    settings: Settings  # its guidance scale and strength stand for all that make the same program
    image: bool = False  # whether there is a picture to change,
    mask: bool = False  # and a mask
    control: bool = False  # whether there are pictures for ControlNets to see,
    prompted: bool = False  # or for IP-Adapters to read
    length: tuple[int, ...] = ()  # of its words, see `Pipeline.length`
    lora: Own | None = None  # that go into the weights; it is all that compiles nothing

    @property
    def compiled(self) -> "Program":
        """The same for rows whose LoRAs are others: nothing is compiled for those."""
        return self._replace(lora=None)

    @property
    def beside(self) -> bool:
        """Whether there are pictures beside the words."""
        return self.image or self.control or self.prompted


class Settle:
    """Judges rows by their options, their pictures and the model; remembers what it said of equal options.

    Threads may ask at once.
    """

    def __init__(self, config: JobConfig, pipe: Pipeline):
        """`config`: as it was given; what is None there depends on the model or on the picture."""
        self.pictures, self.loras = given.OfRows(config, pipe), LorasOfRows(config, pipe)
        self._config, self._pipe = config, pipe
        self._known: dict[tuple, Program | str] = {}

    def __call__(self, row: Row | Rejected) -> Program | str:
        """How to draw a row, or why it cannot be drawn."""
        return self.judge(row)[0]

    def judge(self, row: Row | Rejected) -> tuple[Program | str, str]:
        """The same, and what tells its pictures and LoRAs from others: '' where it has none."""
        if isinstance(row, Rejected):
            return row.reason, ""
        lora = self.loras.of(row)
        if isinstance(lora, str):
            return lora, f"{LORA}none"
        program, mark = self._judged(row)
        if lora is None or isinstance(program, str):
            return program, mark
        return program._replace(lora=lora), f"{mark}{LORA}{lora.mark}"

    def _judged(self, row: Row) -> tuple[Program | str, str]:
        config, picture = self._config, self.pictures.seen(row)
        mark = "none" if isinstance(picture, str) else ""
        if picture is not None and not isinstance(picture, str):
            mark = f"{picture.mark} {picture.height} {picture.width}"
        if first_index(config, row) + config.num_images * config.candidates > MAX_INDEX:
            return f"its pictures would have an index beyond {MAX_INDEX - 1}; write a smaller index", mark
        if isinstance(picture, str):
            return picture, mark
        scale = value_or(row.guidance_scale, config.guidance_scale)
        options = (
            value_or(row.steps, config.steps),
            value_or(row.sampler, config.sampler),
            # Only whether there is guidance makes another program.
            scale if scale == 1 else _guided(config.guidance_scale),
            *(
                (value_or(row.height, config.height), value_or(row.width, config.width))
                if picture is None
                else picture[:2]
            ),
        )
        masked = None if picture is None else picture.masked
        paths = given.Paths() if picture is None else self.pictures.paths(row)
        counts = len(paths.control), len(paths.image_prompts)
        strength = 1.0 if masked is None else self.pictures.strength(row, masked)
        if self._pipe.made_for != edits.FOLLOWS:  # to which any but 1 is a mistake
            strength = _of_equal_share(strength, options[0])
        negative = value_or(row.negative_prompt, config.negative_prompt)
        key = (*options, strength, masked, counts, self._pipe.length(row.prompt, negative, scale))
        if key not in self._known:
            self._known[key] = _program(config, self._pipe, *key)
        return self._known[key], mark

    def fitted(self, program: Program, count: int) -> Program:
        """The program for so many pictures: its batch no larger than they fill, unless one was asked for."""
        settings = program.settings
        if self._config.batch_size is not None:
            return program
        batch_size = min(settings.batch_size, self._pipe.share_of(count * self._config.candidates))
        return program._replace(settings=dataclasses.replace(settings, batch_size=batch_size))


def settle_with(config: JobConfig, pipe: Pipeline) -> Settle:
    """Judges rows of a job with this config."""
    return Settle(config, pipe)


def _guided(scale: float) -> float:
    """A scale that stands for all but 1."""
    return scale if scale != 1 else 2.0


def _of_equal_share(strength: float, steps: int) -> float:
    """A strength that stands for all that take the same steps; itself where it is wrong, or 1."""
    taken = int(steps * strength) if 0 < strength < 1 else 0
    return (taken + 0.5) / steps if 0 < taken < steps else strength


def _program(config: JobConfig, pipe: Pipeline, *options: Any) -> Program | str:
    *how, strength, masked, counts, length = options
    try:
        settings = pipe.settings(*how, strength=strength, **config.of_the_way())
        shape = settings.size
        pipe.check_given([given.stand_in(*shape, masked, *counts)], settings)
    except UserError as error:
        return str(error)
    batch_size = config.batch_size or pipe.batch_size_for(config.shard_size * config.candidates, *shape)
    settings = dataclasses.replace(settings, batch_size=batch_size)
    return Program(settings, masked is not None, bool(masked), *map(bool, counts), length)


def first_index(config: JobConfig, row: Row) -> int:
    """Index of a row's first picture: the row's own, or its place in the job.

    A row with a seed of its own begins at 0, so that its pictures do not depend on its place in the file.
    """
    if row.index is not None:
        return row.index
    own = config.num_images * config.candidates
    return 0 if row.seed is not None else config.first_index + row.number * own


def value_or(value: Any, default: Any) -> Any:
    """The value, unless it is None."""
    return default if value is None else value
