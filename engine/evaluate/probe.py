"""The probe: a small convolutional net that reads from a picture what `engine.scenes` would have drawn.

It names the first and the second thing, the background and the arrangement, each with one softmax over
the classes of `scenes.Labels`. It is trained on fresh renders, in minutes on one core, and never sees a
generated picture: blur and noise in its training make up for the softness of decoded ones.

Two maps of attention over the 8 x 8 cells find the two things (their true boxes supervise the maps); the
class is read from the features under each map by the same weights, so that a thing seen first is also
known second.
"""

import math
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num, UInt8
from safetensors import SafetensorError, numpy

from engine import scenes
from engine.types import Params, UserError

SIZE = 64  # pixels that the net sees
CELLS = SIZE // 8
WIDTHS = (32, 64, 128)
NONE = len(scenes.THINGS)  # the class of a second thing that is not there
CLASSES = {"first": NONE + 1, "second": NONE + 1, "background": len(scenes.BACKGROUNDS)}
CLASSES["arrangement"] = len(scenes.ARRANGEMENTS)


class Logits(NamedTuple):
    """Unnormalised log-probabilities, for each question of `scenes.Labels`."""

    first: Float[Array, "B N"]
    second: Float[Array, "B N"]  # class NONE: there is only one thing
    background: Float[Array, "B K"]
    arrangement: Float[Array, "B A"]
    where: Float[Array, "B 2 T"]  # over the cells, row by row: where the first and the second thing is


class Answers(NamedTuple):
    """Class indices, those of `scenes.Labels` but for second: NONE if there is only one thing."""

    first: Int[np.ndarray, " B"]
    second: Int[np.ndarray, " B"]
    background: Int[np.ndarray, " B"]
    arrangement: Int[np.ndarray, " B"]


def truth(drawn: Iterable[scenes.Scene]) -> Answers:
    """The right answers about so many scenes."""
    first, second, background, arrangement = np.array([scenes.labels(scene) for scene in drawn], np.int32).T
    return Answers(first, np.where(second < 0, NONE, second), background, arrangement)


def init(key: Key[Array, ""]) -> Params:
    """Random weights: a flat dict of name -> array (He et al. 2015; heads and last convolutions small)."""
    narrow, middle, wide = WIDTHS
    shapes = {
        "stem": (3, 3, 12, narrow),
        "down1": (3, 3, narrow, middle),
        "block1.conv1": (3, 3, middle, middle),
        "block1.conv2": (3, 3, middle, middle),
        "down2": (3, 3, middle, wide),
        "block2.conv1": (3, 3, wide, wide),
        "block2.conv2": (3, 3, wide, wide),
        "block3.conv1": (3, 3, wide, wide),
        "block3.conv2": (3, 3, wide, wide),
        "everywhere": (wide, wide),
        "where": (wide, 2),
        "what": (wide, NONE + 1),
        "background": (wide, CLASSES["background"]),
        "arrangement.hidden": (3 * wide, wide),
        "arrangement": (wide, CLASSES["arrangement"]),
    }
    params = {"position": jnp.zeros((CELLS, CELLS, wide))}
    for index, (name, shape) in enumerate(shapes.items()):
        small = 0.1 if name.endswith("conv2") or shape[-1] in (2, *CLASSES.values()) else 1.0
        fan_in = math.prod(shape[:-1])
        noise = jax.random.normal(jax.random.fold_in(key, index), shape)
        params[f"{name}.weight"] = small * math.sqrt(2 / fan_in) * noise
        params[f"{name}.bias"] = jnp.zeros(shape[-1])
    return params


def apply(params: Params, images: Num[Array, "B 64 64 3"]) -> Logits:
    """Reads pictures (0..255, any number type)."""

    def linear(name: str, x):
        return x @ params[f"{name}.weight"] + params[f"{name}.bias"]

    def conv(name: str, x, stride: int = 1):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, params[f"{name}.weight"], (stride, stride), "SAME", dimension_numbers=layout
        )
        return y + params[f"{name}.bias"]

    def block(name: str, x):
        y = conv(f"{name}.conv1", jax.nn.relu(normalized(x)))
        return x + conv(f"{name}.conv2", jax.nn.relu(y))

    x = images.astype(jnp.float32) / 127.5 - 1
    b = len(x)
    x = x.reshape(b, SIZE // 2, 2, SIZE // 2, 2, 3).swapaxes(2, 3).reshape(b, SIZE // 2, SIZE // 2, 12)
    x = jax.nn.relu(conv("stem", x))
    x = block("block1", conv("down1", x, 2))
    x = block("block2", conv("down2", jax.nn.relu(normalized(x)), 2))
    # What is first depends on what else there is, and where: every cell learns of all others.
    x = x + params["position"] + linear("everywhere", normalized(x).mean((1, 2)))[:, None, None]
    x = normalized(block("block3", x)).reshape(b, CELLS * CELLS, -1)

    where = linear("where", x).swapaxes(1, 2)
    things = jax.nn.softmax(where) @ x
    mean = x.mean(1)
    first, second = jnp.moveaxis(linear("what", things), 1, 0)
    hidden = jax.nn.relu(linear("arrangement.hidden", jnp.concatenate([mean, things.reshape(b, -1)], 1)))
    return Logits(first, second, linear("background", mean), linear("arrangement", hidden), where)


def normalized(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Root mean square 1 over the channels (Zhang & Sennrich 2019)."""
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


@jax.jit
def _read(params: Params, images):
    if images.shape[1] != SIZE:
        images = jax.image.resize(images.astype(jnp.float32), (len(images), SIZE, SIZE, 3), "linear")
    return [logits.argmax(-1) for logits in apply(params, images)[: len(Answers._fields)]]


def read(params: Params, images: UInt8[np.ndarray, "B S S 3"], batch_size: int = 50) -> Answers:
    """What the probe sees in square pictures of any size."""
    answers = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        missing = batch_size - len(part)  # padded, so that every batch has the same shape
        part = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)])
        answers.append([np.asarray(answer)[: batch_size - missing] for answer in _read(params, part)])
    return Answers(*(np.concatenate(column) for column in zip(*answers, strict=True)))


def save(params: Params, path: pathlib.Path) -> None:
    """Writes safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(numpy.save({name: np.asarray(value) for name, value in params.items()}))
    os.replace(file.name, path)


def load(path: pathlib.Path) -> Params:
    """Reads what `save` wrote.

    Raises:
      UserError: the file is broken, or holds another probe.
    """
    try:
        params = numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no probe ({error}): delete it, and it will be trained anew") from None
    expected = {name: leaf.shape for name, leaf in jax.eval_shape(init, jax.random.key(0)).items()}
    if {name: value.shape for name, value in params.items()} != expected:
        raise UserError(f"{path} holds a probe of another version: delete it, and it will be trained anew")
    return {name: jnp.asarray(value) for name, value in params.items()}
