"""The picture that a run is to change, read from its files: --image and --mask."""

import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from engine.config import GenerateConfig
from engine.finish import SETTINGS_KEY
from engine.pipeline import Pipeline
from engine.pixels import Crop, Unusable, read_header, read_pixels
from engine.requests import Edit
from engine.types import UserError

LATENTS = 8  # sides are multiples of so many, as most U-Nets halve them three times
T = TypeVar("T")


def size(config: GenerateConfig, pipe: Pipeline) -> tuple[int, int]:
    """Height and width to draw at: those of the config; else about as many pixels as the model has learned to
    draw, in the shape of the picture, which is cropped by what is left over.

    Raises:
      UserError: the picture cannot be read.
    """
    width, height = _shape(config.image)
    default_height, default_width = pipe.default_size
    scale = (default_height * default_width / (height * width)) ** 0.5
    if config.height:
        scale = config.height / height
    elif config.width:
        scale = config.width / width
    step = LATENTS * pipe.model.vae.config.scale

    def rounded(side: float) -> int:
        return max(step, round(side * scale / step) * step)

    return config.height or rounded(height), config.width or rounded(width)


def read(config: GenerateConfig, height: int, width: int) -> Edit:
    """The picture and its mask, scaled to fill height x width and cropped alike.

    Raises:
      UserError: a file cannot be read, or the mask is of another size than the picture.
    """
    image = _read(config.image, lambda file: read_pixels(file, width, height, Crop()))
    if not config.mask:
        return Edit(image)
    if (mine := _shape(config.mask)) != (theirs := _shape(config.image)):
        raise UserError(
            f"{config.mask} has {mine[0]} x {mine[1]} pixels, and the picture {config.image} {theirs[0]} x "
            f"{theirs[1]}: a mask is as large as its picture, white where it is drawn anew"
        )
    mask = _read(config.mask, lambda file: read_pixels(file, width, height, Crop()))
    return Edit(image, mask.astype(np.float32).mean(-1) / 255)


def _shape(path: str) -> tuple[int, int]:
    header = _read(path, lambda file: read_header(file, SETTINGS_KEY))
    return header.width, header.height


def _read(path: str, how: Callable[..., T]) -> T:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return how(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; write the file of a picture") from None
    except Unusable as problem:
        raise UserError(f"{path}: {problem}; write a PNG, JPEG or WebP") from None
