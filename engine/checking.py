"""Finished pictures, looked at on the devices by a safety checker (`engine.models.safety_checker`)."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, UInt8

from engine.parallel import Devices
from engine.parts import computed, kernels_on, module
from engine.sizing import for_clip
from engine.weights.clip_pixels import PixelsConfig
from engine.weights.component import Component


class Checking:
    """The program of a safety checker, in float32."""

    def __init__(self, checker: Component, devices: Devices):
        self.checker, self._devices = checker, devices
        self._program = devices.map(self._checked)

    def __call__(self, images: UInt8[jax.Array, "B H W 3"]) -> Bool[jax.Array, " B"]:
        """Which of them may be shown."""
        return self._program(self.checker.params, images)

    def _checked(self, params: Any, images: Any) -> Any:
        devices = self._devices
        net = module(self.checker, devices.whole(computed(params, devices)))
        side = self.checker.config.vision_config.image_size
        # Thresholds have three digits, as many as a product of bfloat16.
        with kernels_on(devices), jax.default_matmul_precision("float32"):
            return net(prepared(images, side))


def prepared(images: UInt8[Array, "B H W 3"], side: int) -> Float[Array, "B S S 3"]:
    """Pictures as CLIP's image encoder takes them, of that side."""
    return for_clip(images, PixelsConfig(size=side, crop_size=(side, side)))
