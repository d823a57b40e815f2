"""Finished pictures, enlarged on the devices by a network made for it (`engine.models.upscalers`)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, UInt8

from engine.finish import to_uint8
from engine.models.tiles import PARTS, decode_in_tiles
from engine.parallel import Devices
from engine.parts import computed, module
from engine.weights.network import Network


class Enlarging:
    """The program of an upscaler."""

    def __init__(self, upscaler: Network, devices: Devices, tile: int = 0):
        """tile: side in pixels, of the parts in which it makes larger pictures; 0: none."""
        self.scale = upscaler.config.scale
        self._upscaler, self._devices, self._tile = upscaler, devices, tile
        self.program = devices.map(self._enlarged)

    def __call__(
        self, images: UInt8[jax.Array, "B H W 3"], finite: Bool[jax.Array, " B"]
    ) -> tuple[UInt8[jax.Array, "B H2 W2 3"], Bool[jax.Array, " B"]]:
        """Pictures `scale` times as wide and high, and which are finite, as they were before and are now."""
        return self.program(self._upscaler.params, (images, finite))

    def _enlarged(self, params: Any, batched: Any) -> Any:
        devices, scale = self._devices, self.scale
        params = devices.whole(computed(params, devices))
        net = module(self._upscaler, params)
        dtype = jax.tree.leaves(params)[0].dtype
        tile = max(self._tile // scale // PARTS, 1) * PARTS if self._tile else 0

        def one(image: jax.Array) -> tuple[jax.Array, jax.Array]:
            small = (image / jnp.float32(255)).astype(dtype)[None]
            large = decode_in_tiles(net, small, tile, scale)[0].astype(jnp.float32)
            return to_uint8(2 * jnp.nan_to_num(large)[None] - 1)[0], jnp.isfinite(large).all()

        # One after another: each fills a device, and takes many times the memory that it took to draw it.
        each = devices.over_batch(lambda images: jax.lax.map(one, images))
        images, finite = batched
        images, sound = each(images)
        return images, finite & sound
