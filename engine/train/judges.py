"""Who says how good a picture is that a model in training draws: a CLIP, or the probe of the drawn world.

A judge is told of each picture what was asked for, and its verdict has a gradient in the pixels.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from engine.config import PROBE, RewardConfig
from engine.evaluate import reader
from engine.evaluate.answers import QUESTIONS, truth
from engine.evaluate.reader_training import soften
from engine.parts import module
from engine.train.step import Batch, Metrics
from engine.weights.clip import Clip, load_clip
from engine.weights.clip_pixels import prepared
from engine.world.scene import Scene

Levels = Float[Array, "B H W 3"]  # 0 to 255, not rounded
Verdict = tuple[Float[Array, " B"], Metrics]  # the reward of each picture, float32, and what else is of note


class Asked(NamedTuple):
    """What pictures are to be drawn of."""

    captions: list[str]
    scenes: list[Scene] | None = None  # of the drawn world


class Judge(NamedTuple):
    """Who says how good pictures are.

    Attributes:
      params: of its network.
      told: what it is told of pictures: rows of a batch.
      verdict: (params, pictures, what it was told, key) -> rewards and metrics.
      of_world: whether it judges scenes of the drawn world, and nothing else.
    """

    params: Any
    told: Callable[[Asked], dict[str, np.ndarray]]
    verdict: Callable[[Any, Levels, Batch, Key[Array, ""]], Verdict]
    of_world: bool = False


def judge(config: RewardConfig) -> Judge:
    """The probe in the package or of a file, or the CLIP of a folder.

    Raises:
      UserError: there is none, or it cannot be used.
    """
    if config.of_world:
        file = reader.SHIPPED if config.judge == PROBE else pathlib.Path(config.judge).expanduser()
        return Judge(reader.load(file), _scenes_told, _read, of_world=True)
    clip = load_clip(config.judge, lambda leaf, array: array)
    return Judge(
        clip.model.params,
        lambda asked: {"judged_ids": clip.tokenizer.encode(asked.captions)},
        functools.partial(_agreement, clip),
    )


def _agreement(clip: Clip, params: Any, pictures: Levels, batch: Batch, key: Key[Array, ""]) -> Verdict:
    """100 cos of picture and caption: the CLIP score, but for its lower end at 0."""
    own = module(clip.model, params)
    seen = own.image_features(prepared(pictures, clip.pixels))
    return 100 * jnp.sum(seen * own.text_features(batch["judged_ids"]), -1), {}


def _scenes_told(asked: Asked) -> dict[str, np.ndarray]:
    """The right answers, and whether it is open which of two things is seen first."""
    if asked.scenes is None:
        raise ValueError("the probe judges scenes of the drawn world, not other prompts")
    either = np.array([scene.relation == "next to" for scene in asked.scenes])
    return {**truth(asked.scenes)._asdict(), "either": either}


def _read(params: Any, pictures: Levels, batch: Batch, key: Key[Array, ""]) -> Verdict:
    """The log-probability, in nats, of all right answers: of pictures as soft as those that it learned from.

    Of two things next to each other, either may be the first.
    """
    if pictures.shape[1:3] != (reader.SIZE, reader.SIZE):
        pictures = jax.image.resize(pictures, (len(pictures), reader.SIZE, reader.SIZE, 3), "linear")
    read = reader.apply(params, soften(pictures, key))
    log_probs = {name: jax.nn.log_softmax(logits) for name, logits in read.answers.items()}

    def of(question: str, answer: str) -> Float[Array, " B"]:
        return jnp.take_along_axis(log_probs[question], batch[answer][:, None], 1)[:, 0]

    pairs = ("first", "second"), ("first_colour", "second_colour")
    straight = sum(of(name, name) for pair in pairs for name in pair)
    crossed = sum(of(one, other) + of(other, one) for one, other in pairs)
    things = jnp.where(batch["either"], jnp.logaddexp(straight, crossed), straight)
    rest = QUESTIONS.keys() - {name for pair in pairs for name in pair}
    right = {name: (read.answers[name].argmax(-1) == batch[name]).mean() for name in ("first", "second")}
    return things + sum(of(name, name) for name in sorted(rest)), right
