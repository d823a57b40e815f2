"""Pictures brought to another size by a filter, on the devices, as Pillow does."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from engine.parallel import Devices
from engine.weights.clip_pixels import PixelsConfig, filter_of, prepared, scaled_size


class Sizing:
    """The programs of it, by Lanczos's filter; one for each size."""

    def __init__(self, devices: Devices):
        self._devices = devices
        self._program = functools.cache(self._build)

    def __call__(
        self, images: UInt8[jax.Array, "B H W 3"], height: int, width: int
    ) -> UInt8[jax.Array, "B {height} {width} 3"]:
        """Of that size; themselves where they have it."""
        return images if images.shape[1:3] == (height, width) else self._program(height, width)((), images)

    def _build(self, height: int, width: int) -> Callable:
        def sized(_: Any, images: Any) -> Any:
            return resized(images, height, width, "lanczos3").astype(jnp.uint8)

        return self._devices.map(sized)


def for_clip(images: UInt8[Array, "B H W 3"], config: PixelsConfig) -> Float[Array, "B h w 3"]:
    """Pictures as CLIP's image encoder takes them, scaled as Pillow does: clip_pixels.prepare on devices.

    Raises:
      UserError: they are scaled by a filter that devices have not.
    """
    levels = images.astype(jnp.float32)
    if config.do_resize:
        levels = resized(images, *scaled_size(*images.shape[1:3], config.size), filter_of(config))
        config = dataclasses.replace(config, do_resize=False)
    return prepared(levels, config)


def resized(
    images: UInt8[Array, "B H W 3"], height: int, width: int, method: str
) -> Float[Array, "B {height} {width} 3"]:
    """One axis after another, to whole levels, as Pillow does: which is more than a level of difference.

    Args:
      method: of jax.image.resize.
    """
    x = images.astype(jnp.float32)
    for axis, length in ((2, width), (1, height)):
        shape = tuple(length if i == axis else side for i, side in enumerate(x.shape))
        x = jnp.round(jnp.clip(jax.image.resize(x, shape, method, antialias=True), 0, 255))
    return x
