"""IP-Adapters beside a model (engine.models.ip_adapter): a picture for each, which it reads as a prompt.

What the image encoder and the adapter make of the pictures are tokens; what the U-Net's layers make of those
is computed once for all steps, as it is of the words (`engine.conditions.Told.read`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from engine.config import check_count
from engine.models.attention import Read
from engine.models.clip_vision import CLIPVisionModelWithProjection
from engine.models.ip_adapter import IPAdapter
from engine.requests import Given
from engine.types import UserError
from engine.weights.clip_pixels import PixelsConfig, fitted, normalized
from engine.weights.ip_adapter import Adapter

LONGEST = 100  # times as long as it is wide: to be read, a picture is scaled by its shorter side


class Tokens(NamedTuple):
    """What an adapter makes of its pictures."""

    cond: Float[Array, "B T D"]
    uncond: Float[Array, "B T D"]  # of no picture


def checked(given: Sequence[Given], count: int) -> None:
    """UserError where there are not as many pictures as adapters, or one that none can read."""
    for each in given:
        check_count("ip_adapter", len(each.image_prompt), count)
        for picture in each.image_prompt:
            if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8 or not picture.size:
                told = f"{picture.shape} of {picture.dtype}"
                raise UserError(f"an image prompt of shape {told}: it must be (height, width, 3) of uint8")
            check_sides(*picture.shape[:2])


def check_sides(height: int, width: int, what: str = "an image prompt") -> None:
    """UserError for a picture that is too long."""
    if max(height, width) > LONGEST * min(height, width):
        raise UserError(
            f"{what} of {width} x {height} pixels: it may be {LONGEST} times as long as it is wide; cut it"
        )


def pixels(given: Sequence[Given], adapters: Sequence[Adapter]) -> tuple[UInt8[np.ndarray, "B S S 3"], ...]:
    """A batch of pictures for each adapter, as large as its image encoder takes them."""
    pictures = zip(*(each.image_prompt for each in given), strict=True)
    return tuple(
        np.stack([fitted(picture, prepared_for(adapter)) for picture in batch])
        for adapter, batch in zip(adapters, pictures, strict=True)
    )


def prepared_for(adapter: Adapter) -> PixelsConfig:
    """How pictures are scaled and cropped: a square of CLIP's, as in diffusers."""
    side = adapter.encoder.config.image_size
    return PixelsConfig(size=side, crop_size=(side, side))


def seen(net: IPAdapter, encoder: CLIPVisionModelWithProjection, pictures: UInt8[Array, "B S S 3"]) -> Tokens:
    """What an adapter makes of pictures, and of none: a vector of zeros, or what is said of grey."""
    x = normalized(pictures.astype(jnp.float32)).astype(net.dtype)
    if not net.config.of_patches:
        vectors = encoder(x)
        return Tokens(net.tokens(vectors), net.tokens(jnp.zeros_like(vectors)))
    nothing = net.tokens(encoder.patches(jnp.zeros_like(x[:1])))
    tokens = net.tokens(encoder.patches(x))
    return Tokens(tokens, jnp.broadcast_to(nothing, tokens.shape))


def joined(
    read: Read,
    places: Sequence[str],
    nets: Sequence[IPAdapter],
    tokens: Sequence[Float[Array, "B _ D"]],
    scales: Sequence[Float[Array, " N"]],
) -> Read:
    """What layers make of words, and beside it what they make of the adapters' tokens.

    Args:
      places: of the layers, in the order of the adapters.
      tokens, scales: of each adapter; a scale for each layer.
    """
    read = dict(read)
    for net, own, each in zip(nets, tokens, scales, strict=True):
        for place, pair in zip(places, net.read(own, each), strict=True):
            read[place] = (*read[place], *pair)
    return read
