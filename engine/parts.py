"""Parts of a model inside of compiled programs."""

import contextlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from engine.diffusion.parameterization import at_least_float32
from engine.models.kernels import kernels
from engine.parallel import Devices
from engine.weights import quantized
from engine.weights.component import Component
from engine.weights.network import Network


def module(part: Component | Network, params: Any) -> nnx.Module:
    """The module of a part around (traced) params."""
    return nnx.merge(part.graphdef, nnx.State(quantized.wide(params)))


def computed(params: Any, devices: Devices) -> Any:
    """Params as the arithmetic takes them. CPUs have no fast convolution but in float32."""
    if devices.platform != "cpu":
        return params
    return jax.tree.map(lambda x: x if x.dtype == np.float32 else at_least_float32(x), quantized.wide(params))


def kernels_on(devices: Devices) -> contextlib.AbstractContextManager[None]:
    """Within, what is traced for these devices uses their kernels."""
    return kernels(devices.platform, devices.over_batch)
