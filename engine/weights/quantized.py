"""Kernels of a U-Net in 8 bits, with a scale for each output channel: half the memory of bfloat16.

Only what is stored changes. Each kernel is made wide where it is used (on CPUs all of them before the steps,
which are quicker so, and take more memory), and arithmetic, activations, norms, biases, the first and the
last convolution and what embeds the time stay as they are. The numbers are those of qwix, the quantization
library of JAX.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.config import nearest
from engine.types import Params, UserError
from engine.weights.component import Place

TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
BLOCKS = ("unet.down_blocks.", "unet.mid_block.", "unet.up_blocks.")


def placing(place: Place, quantize: str) -> Place:
    """`place`, of arrays or their shapes, with the kernels of the U-Net's blocks in one of TYPES.

    Raises:
      UserError: an unknown type, or qwix is not installed.
    """
    if quantize not in TYPES:
        raise UserError(
            f"quantize={quantize!r} is unknown{nearest(quantize, TYPES)}; write {' or '.join(TYPES)}"
        )
    store = _quantizer(quantize)

    def placed(name: str, array: np.ndarray | jax.ShapeDtypeStruct) -> Any:
        leaf = place(name, array)
        if not name.startswith(BLOCKS) or len(array.shape) < 2:
            return leaf
        return jax.eval_shape(store, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else store(leaf)

    return placed


@functools.cache
def _quantizer(quantize: str) -> Callable[[jax.Array], Any]:
    try:
        import qwix
    except ImportError:
        raise UserError(f"quantize={quantize!r} needs qwix: pip install 'fogsculpt[quantize]'") from None

    # kernels have their output channels last
    return jax.jit(lambda a: qwix.quantize(a, TYPES[quantize], channelwise_axes=(a.ndim - 1,)))


def wide(params: Params) -> Params:
    """The parameters as arrays, those in 8 bits in the type that they came from."""
    return jax.tree.map(_wide, params, is_leaf=_is_quantized)


def _is_quantized(leaf: Any) -> bool:
    return hasattr(leaf, "qvalue")


def _wide(leaf: Any) -> Any:
    if not _is_quantized(leaf):
        return leaf
    import qwix

    return qwix.dequantize(leaf)
