"""Typed dataclasses for every job, and the strict reader for the JSON configs of model folders."""

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from engine.errors import UserError

T = TypeVar("T")

MAX_PICTURES = 100_000  # of one run
MAX_BATCH_SIZE = 4096
MAX_UPSCALE = 16

# What JSON calls the types of our annotations.
IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def nearest(word: str, words: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of `words`, or '' if none is close."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _alternatives(annotation: Any) -> tuple:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_a(value: Any, annotation: Any) -> bool:
    """Whether a value from JSON has the annotated type. A whole number is a number; true is neither."""
    if len(alternatives := _alternatives(annotation)) > 1:
        return any(_is_a(value, one) for one in alternatives)
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, typing.get_args(annotation)[0]) for v in value)
    if annotation in (int, float):
        number = isinstance(value, (int, annotation)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # neither NaN nor beyond all floats
    return annotation is Any or isinstance(value, annotation)


def _in_words(annotation: Any) -> str:
    if len(alternatives := _alternatives(annotation)) > 1:
        return " or ".join(map(_in_words, alternatives))
    if typing.get_origin(annotation) is tuple:
        return f"a list, each {_in_words(typing.get_args(annotation)[0])}"
    return IN_WORDS.get(annotation, "a list")


def from_json(
    cls: type[T], options: Mapping[str, Any], where: str, fixed: Mapping[str, tuple] | None = None
) -> T:
    """Builds the dataclass `cls` from a JSON object, and refuses what it does not know.

    Args:
      options: the JSON object. Keys that start with '_' are the writer's own notes and are dropped.
      where: the file, for the messages.
      fixed: options of the original that the engine implements for some values only: name -> those
        values. They are checked, not stored.

    Raises:
      UserError: an unknown option, a value of another type than the field's, or a fixed option with a
        value that the engine does not implement.
    """
    known = typing.get_type_hints(cls)
    kept = {}
    for name, value in options.items():
        if name.startswith("_"):
            continue
        if name in known:
            kept[name] = tuple(value) if isinstance(value, list) else value
            if not _is_a(kept[name], known[name]):
                raise UserError(f"{where}: {name}={json.dumps(value)}: write {_in_words(known[name])}")
        elif name in (fixed or {}):
            allowed = fixed[name]
            if (list(value) if isinstance(value, tuple) else value) not in allowed:
                raise UserError(
                    f"{where}: {name}={value!r} is not supported; supported: {', '.join(map(repr, allowed))}"
                )
        else:
            raise UserError(f"{where}: unknown option {name!r}{nearest(name, known)}")
    try:
        return cls(**kept)
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: {error}") from None


def to_json(config: Any, class_name: str) -> dict[str, Any]:
    """The JSON object that `from_json` reads back: `_class_name` first, then every option."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return {"_class_name": class_name, **options}


@dataclasses.dataclass
class GenerateConfig:
    """Pictures to draw into a folder. What is None is known when the model is loaded."""

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    num_images: int = 1  # of each prompt
    seed: int | None = None  # None: a fresh one
    first_index: int = 0  # of the first picture; seed and index address its noise
    model: str = "shipped"  # a folder, or this word for the one in the package
    sampler: str | None = None  # None: the one that the model's folder names
    steps: int = 30
    guidance_scale: float = 5.0
    height: int | None = None  # pixels; None: the size that the model was trained for
    width: int | None = None
    dtype: str = "float32"
    parallel: str = "shard_map"
    split_params: bool = False  # the model over the devices, where one is too small for it; parallel="jit"
    batch_size: int | None = None  # pictures that a device draws at once
    out: str = "out"
    upscale: int = 1
    frames: int | None = None  # stages from static to picture, in a strip
    animate: bool = False

    def validate(self) -> None:
        """Raises UserError for what is wrong with any model; the rest is checked when it is loaded."""
        if not self.prompts:
            raise UserError("no prompt: write what to draw, such as 'a fox on a skateboard at sunset'")
        if len(self.prompts) * self.num_images > MAX_PICTURES:
            raise UserError(
                f"{len(self.prompts)} prompts with num_images={self.num_images}: write at most "
                f"{MAX_PICTURES} pictures a run, or put the prompts into a file for --prompts_file"
            )
        self.check_drawing()

    def check_drawing(self) -> None:
        """The part of `validate` that has nothing to do with where prompts come from."""
        if self.split_params and self.parallel != "jit":
            raise UserError(f"split_params with parallel={self.parallel!r}: write --parallel jit")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed} is out of range; write 0 to {2**64 - 1}")
        ranges = {
            "num_images": (1, MAX_PICTURES),
            "first_index": (0, 2**32 - MAX_PICTURES),
            "batch_size": (1, MAX_BATCH_SIZE),
            "upscale": (1, MAX_UPSCALE),
        }
        self.check_ranges(ranges)

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Raises UserError for the first number that is not within its range; None is."""
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}={value} is out of range; write {low} to {high}")


FORMATS = ("files", "webdataset", "arrayrecord", "parquet")


@dataclasses.dataclass
class JobConfig(GenerateConfig):
    """Pictures by the million: a file of prompts into shards of pictures.

    The options of GenerateConfig hold for every row of the file that does not say otherwise.
    """

    prompts_file: str = ""  # .txt, .jsonl, .csv or .parquet, or - for standard input
    format: str = "files"  # of the shards
    shard_size: int = 256  # pictures in a shard
    processes: int | None = None  # that share the job, each with its part; None: what the cluster says
    process_id: int | None = None  # of this one, from 0
    coordinator: str | None = None  # host:port of process 0, where split_params brings processes together
    elastic: bool = False  # take shards by claims in the output folder, so that workers may come and go
    lease: float = 60.0  # seconds without a heartbeat after which a claim is taken over
    writers: int = 4  # threads that make PNGs
    patience: float = 60.0  # seconds of trying again where the output folder fails

    def validate(self) -> None:
        """Raises UserError for what is wrong with any model; the rest is checked when it is loaded."""
        if self.prompts:
            raise UserError(
                "prompts stand in the file of --prompts_file; leave out those on the command line"
            )
        if self.frames is not None or self.animate:
            raise UserError("frames and animate are for single pictures; leave them out of a job")
        if self.format not in FORMATS:
            raise UserError(
                f"format={self.format!r} is unknown{nearest(self.format, FORMATS)}; "
                f"write {', '.join(FORMATS)}"
            )
        ranges = {"shard_size": (1, MAX_PICTURES), "writers": (1, 64), "lease": (1, 86400)}
        self.check_ranges(ranges | {"patience": (0, 86400)})
        self.check_drawing()


@dataclasses.dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with a warm-up, a flat stretch and a linear way down to zero.

    The flat stretch leaves the length of a run open: the way down is the last `decay_steps` of it.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 200
    decay_steps: int = 1000
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.01  # of matrices and kernels, not of norms and biases
    clip_norm: float = 1.0


@dataclasses.dataclass
class StageConfig:
    """One training run of one set of parameters."""

    steps: int = 1000
    batch_size: int = 32  # of all devices together
    ema_decay: float = 0.999
    checkpoint_every: int = 500
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


@dataclasses.dataclass
class AutoencoderStage(StageConfig):
    """Pictures to latents and back: squared error plus a small pull towards the unit Gaussian."""

    kl_weight: float = 1e-4  # of the KL divergence, in nats per latent value


@dataclasses.dataclass
class WordsStage(StageConfig):
    """The text encoder, from captions alone: what does the scene show?"""


@dataclasses.dataclass
class DiffusionStage(StageConfig):
    """The U-Net, between an autoencoder and a text encoder that stay as they are."""

    time_sampling: str = "logit_normal"
    time_mean: float = 0.0  # of log sigma
    time_std: float = 1.0
    caption_dropout: float = 0.1  # so that guidance has an unconditional model to steer away from
    easy: float = 0.0  # the share of scenes of one big thing at the start, none after `easy_steps`
    easy_steps: int = 0


@dataclasses.dataclass
class TrainConfig:
    """A model: its autoencoder, its text encoder, its U-Net, then its decoder again.

    The last stage sharpens pictures without moving the latents that the U-Net learned; 0 steps leave it out.

    `start` names the folder of a model of the same shape whose weights and tokenizer the run begins with, in
    place of fresh ones. Then 0 steps leave out any stage, and its part stays as it is in the folder.

    `vae`, `unet`, `text_encoder` and `scheduler` are the options of the folder's config files; what
    follows from the tokenizer or from the other parts is filled in.
    """

    seed: int = 0
    image_size: int = 64
    vocab_size: int = 1024
    max_tokens: int = 32
    start: str = ""  # a folder; none: everything from scratch
    vae: dict = dataclasses.field(default_factory=dict)
    unet: dict = dataclasses.field(default_factory=dict)
    text_encoder: dict = dataclasses.field(default_factory=dict)
    scheduler: dict = dataclasses.field(default_factory=dict)
    autoencoder: AutoencoderStage = dataclasses.field(default_factory=AutoencoderStage)
    words: WordsStage = dataclasses.field(default_factory=WordsStage)
    diffusion: DiffusionStage = dataclasses.field(default_factory=DiffusionStage)
    decoder: AutoencoderStage = dataclasses.field(default_factory=lambda: AutoencoderStage(steps=0))

    def validate(self) -> None:
        """Raises UserError, saying what to write instead, before anything is compiled."""
        for name in ("autoencoder", "words", "diffusion", "decoder"):
            stage = getattr(self, name)
            for field in ("steps", "batch_size", "checkpoint_every"):
                least = 0 if field == "steps" and (self.start or name == "decoder") else 1
                if getattr(stage, field) < least:
                    raise UserError(f"{name}.{field}={getattr(stage, field)}: write a number from {least}")
            if not 0 <= stage.ema_decay < 1:
                raise UserError(f"{name}.ema_decay={stage.ema_decay}: write a number from 0 to below 1")
            if stage.optim.learning_rate <= 0:
                raise UserError(f"{name}.optim.learning_rate={stage.optim.learning_rate}: write one above 0")
        for field in ("caption_dropout", "easy"):
            if not 0 <= (share := getattr(self.diffusion, field)) <= 1:
                raise UserError(f"diffusion.{field}={share}: write 0 to 1")
        if self.diffusion.easy and self.diffusion.easy_steps < 1:
            raise UserError(
                f"diffusion.easy={self.diffusion.easy} for {self.diffusion.easy_steps} steps: "
                "write easy_steps from 1, or easy=0"
            )
