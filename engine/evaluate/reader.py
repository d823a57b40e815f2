"""The probe of the drawn world: a small convolutional net that reads from a picture what `engine.world` drew.

It answers the questions of `engine.evaluate.answers`, each with one softmax. It is trained on fresh renders
alone and never sees a generated picture: blur and noise in its training make up for the softness of decoded
ones. Combinations that are held out from the models' training are in its own, since it measures those too.

Two maps of attention over the 8 x 8 cells find the first and the second thing (their true places supervise
the maps). What a thing is and which colour it has is read from the features under its map, by the same
weights for both, so that what is known as a rider is known as a mount.
"""

import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file

from engine.evaluate.answers import QUESTIONS, Answers
from engine.types import Params, UserError
from engine.weights.files import new_file
from engine.weights.safetensors_io import write

SHIPPED = pathlib.Path(__file__).parents[1] / "assets" / "probe.safetensors"
SIZE = 128  # pixels that the net sees
PATCH = 4  # of them a side are one place of its first layer
CELLS = SIZE // 16
WIDTHS = (64, 128, 192)
FEATURES = 3 * WIDTHS[-1]  # of a picture: of all of it, of its first and its second thing
BATCH_SIZE = 50


class Logits(NamedTuple):
    """What the net says of a batch of pictures.

    Attributes:
      answers: unnormalised log-probabilities for each question: name -> (B, number of answers).
      where: (B, 2, T) over the cells, row by row: where the first and the second thing is.
      features: (B, FEATURES), what the answers are read from.
    """

    answers: dict[str, Float[Array, "B _"]]
    where: Float[Array, "B 2 T"]
    features: Float[Array, "B F"]


class Reading(NamedTuple):
    """What the net says of pictures, on the host."""

    answers: Answers
    log_probs: dict[str, Float[np.ndarray, "B _"]]  # question -> of each answer
    features: Float[np.ndarray, "B F"]


def _shapes() -> dict[str, tuple[int, ...]]:
    narrow, middle, wide = WIDTHS
    shapes: dict[str, tuple[int, ...]] = {"stem": (3, 3, 3 * PATCH**2, narrow)}
    for name, width, before in (("1a", narrow, 0), ("2a", middle, narrow), ("2b", middle, 0)):
        shapes |= _block(name, width, before)
    for name, before in (("3a", middle), ("3b", 0), ("3c", 0)):
        shapes |= _block(name, wide, before)
    shapes |= {"everywhere": (wide, wide), "where": (wide, 2)}
    shapes |= {"what": (wide, QUESTIONS["first"]), "which colour": (wide, wide)}
    shapes |= {"colour": (wide, QUESTIONS["first_colour"]), "together": (FEATURES, wide)}
    for question in ("count", "arrangement", "background", "time", "style"):
        shapes[question] = (wide, QUESTIONS[question])
    return shapes


def _block(name: str, width: int, before: int) -> dict[str, tuple[int, ...]]:
    down = {f"{name}.down": (3, 3, before, width)} if before else {}
    return down | {f"{name}.conv1": (3, 3, width, width), f"{name}.conv2": (3, 3, width, width)}


def init(key: Key[Array, ""]) -> Params:
    """Random weights: a flat dict of name -> array (He et al. 2015; heads and last convolutions small)."""
    params = {"position": jnp.zeros((CELLS, CELLS, WIDTHS[-1]))}
    for index, (name, shape) in enumerate(_shapes().items()):
        small = 0.1 if name.endswith("conv2") or shape[-1] in (2, *QUESTIONS.values()) else 1.0
        noise = jax.random.normal(jax.random.fold_in(key, index), shape)
        params[f"{name}.weight"] = small * math.sqrt(2 / math.prod(shape[:-1])) * noise
        params[f"{name}.bias"] = jnp.zeros(shape[-1])
    return params


def apply(params: Params, images: Num[Array, "B 128 128 3"]) -> Logits:
    """Reads pictures (0..255, any number type)."""

    def linear(name: str, x):
        return x @ params[f"{name}.weight"] + params[f"{name}.bias"]

    def conv(name: str, x, stride: int = 1):
        kernel, layout = params[f"{name}.weight"], ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=layout)
        return y + params[f"{name}.bias"]

    def block(name: str, x):
        y = conv(f"{name}.conv1", jax.nn.relu(normalized(x)))
        return x + conv(f"{name}.conv2", jax.nn.relu(normalized(y)))

    x = images.astype(jnp.float32) / 127.5 - 1
    b, side = len(x), SIZE // PATCH
    x = x.reshape(b, side, PATCH, side, PATCH, 3).swapaxes(2, 3).reshape(b, side, side, 3 * PATCH**2)
    x = block("1a", jax.nn.relu(conv("stem", x)))
    x = block("2a", conv("2a.down", jax.nn.relu(normalized(x)), 2))
    x = block("2b", x)
    x = block("3a", conv("3a.down", jax.nn.relu(normalized(x)), 2))
    # What is first depends on what else there is, and where: every cell learns of all others.
    x = x + params["position"] + linear("everywhere", normalized(x).mean((1, 2)))[:, None, None]
    x = normalized(block("3c", block("3b", x))).reshape(b, CELLS * CELLS, -1)

    where = linear("where", x).swapaxes(1, 2)
    things = jax.nn.softmax(where) @ x
    features = jnp.concatenate([x.mean(1), things.reshape(b, -1)], 1)
    what = linear("what", things)
    colours = linear("colour", jax.nn.relu(linear("which colour", things)))
    together = jax.nn.relu(linear("together", features))
    answers = {"first": what[:, 0], "second": what[:, 1]}
    answers |= {"first_colour": colours[:, 0], "second_colour": colours[:, 1]}
    answers |= {name: linear(name, together) for name in QUESTIONS if name not in answers}
    return Logits(answers, where, features)


def normalized(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Root mean square 1 over the channels (Zhang & Sennrich 2019)."""
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


@jax.jit
def _read(params: Params, images: UInt8[Array, "B S S 3"]):
    if images.shape[1] != SIZE:
        images = jax.image.resize(images.astype(jnp.float32), (len(images), SIZE, SIZE, 3), "linear")
    answers, _, features = apply(params, images)
    return {name: jax.nn.log_softmax(logits) for name, logits in answers.items()}, features


def read(params: Params, images: UInt8[np.ndarray, "B S S 3"]) -> Reading:
    """What the probe sees in square pictures of any size."""
    parts = []
    for start in range(0, len(images), BATCH_SIZE):
        part = images[start : start + BATCH_SIZE]
        missing = BATCH_SIZE - len(part)  # padded, so that every batch has the same shape
        padded = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)])
        parts.append(jax.tree.map(lambda x: np.asarray(x)[: len(part)], _read(params, padded)))  # noqa: B023
    log_probs, features = jax.tree.map(lambda *columns: np.concatenate(columns), *parts)
    answers = Answers(**{name: log_probs[name].argmax(1) for name in QUESTIONS})
    return Reading(answers, {name: log_probs[name] for name in QUESTIONS}, features)


def save(params: Params, path: pathlib.Path) -> None:
    """Writes safetensors in float16, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(value, np.float16) for name, value in params.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    with new_file(path) as new:
        write(new, shapes, dict.fromkeys(arrays, np.dtype(np.float16)), arrays.__getitem__)


def load(path: pathlib.Path) -> Params:
    """Reads what `save` wrote, as float32.

    Raises:
      UserError: there is no such file, it is broken, or holds another probe.
    """
    if not path.exists():
        raise UserError(f"there is no probe {path}: write a file that launch.probe has made")
    try:
        params = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no probe ({error})") from None
    expected = {name: leaf.shape for name, leaf in jax.eval_shape(init, jax.random.key(0)).items()}
    if {name: value.shape for name, value in params.items()} != expected:
        raise UserError(f"{path} holds a probe of another version")
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
