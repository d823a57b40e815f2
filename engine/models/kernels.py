"""Attention in a kernel that never writes the scores to memory: JAX's for TPUs, cuDNN's on GPUs.

A kernel works on what one device has, so it is used only inside of `kernels`, by which a program says how its
arrays are spread. Everywhere else the compiler makes its own of `engine.models.attention`.
"""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engine.errors import UserNotice

LANES = 128  # queries, keys, and channels beyond as many, come in multiples of this
BLOCK = 1024  # queries, and keys, at work at a time: 4 MiB of scores, of the 16 that a kernel may have
WIDE_BLOCK = 2048  # queries where channels are few: keys are fetched again for each block of queries
# Keys at a time in the derivative of queries: of a sum, JAX writes as many copies, and reads 128 of them.
BACK_BLOCK = 256
# Queries, and keys: fewer have scores that the compiler for TPUs keeps in fast memory by itself. So have many
# that meet the 77 keys of a prompt: there a kernel moves 3 to 8 times the bytes, in training 12 to 34 times.
# GPUs have the same limit, and were not measured.
MIN_TOKENS = 1024
HIDDEN = -1e30  # score of a key that only fills a block
CUDNN_CHANNELS = 128  # of a head, at most, on every GPU, with derivatives

Kernel = Callable[[Array, Array, Array], Array]
OverBatch = Callable[[Callable[..., Any]], Callable[..., Any]]

_here: contextvars.ContextVar[tuple[str, OverBatch] | None] = contextvars.ContextVar("kernels", default=None)


@contextlib.contextmanager
def kernels(platform: str, over_batch: OverBatch) -> Iterator[None]:
    """What is traced inside uses the kernels that there are for the platform ("tpu", "gpu", "cpu", ...).

    Args:
      over_batch: makes of a function of arrays, whose first axis is the batch, one that works on each
        device's own part of them (`engine.parallel.Devices.over_batch`).
    """
    token = _here.set((platform, over_batch))
    try:
        yield
    finally:
        _here.reset(token)


def flash(q: Float[Array, "B N T K"], k: Float[Array, "B N S K"]) -> Kernel | None:
    """softmax(q k^T) v of such q and k, and v as k; None where the compiler does it as well."""
    if (here := _here.get()) is None or min(q.shape[2], k.shape[2]) < MIN_TOKENS:
        return None
    platform, _ = here
    if platform == "tpu":
        return on_each_device(_flash)
    # An odd number of keys has no derivative in JAX's rules for cuDNN.
    if platform == "gpu" and k.shape[2] % 2 == q.shape[2] % 2 == 0 and cudnn_attends(q.shape[3], q.dtype):
        return on_each_device(_cudnn)
    return None


def on_each_device(f: Kernel) -> Kernel:
    """`f`, done by each device for its own part of the batch where a program said how it is spread."""
    return f if (here := _here.get()) is None else here[1](f)


@functools.cache
def cudnn_attends(channels: int, dtype: np.dtype) -> bool:
    """Whether cuDNN has a kernel for heads of so many channels on this GPU: a small one is compiled."""
    if dtype not in (jnp.bfloat16, jnp.float16) or channels % 8 or channels > CUDNN_CHANNELS:
        return False

    def loss(q: Array, k: Array, v: Array) -> Array:
        return _cudnn(q, k, v).astype(jnp.float32).sum()

    like = jax.ShapeDtypeStruct((1, 1, 128, channels), dtype)
    try:
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(like, like, like).compile()
    except (RuntimeError, ValueError) as error:  # no cuDNN, one that is too old, or a GPU that has none of it
        why = str(error).partition("\n")[0]
        warnings.warn(f"attention without cuDNN, slower and with more memory: {why}", UserNotice, 2)
        return False
    return True


def _cudnn(
    q: Float[Array, "B N T K"], k: Float[Array, "B N S K"], v: Float[Array, "B N S K"]
) -> Float[Array, "B N T K"]:
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn").swapaxes(1, 2)


def _flash(
    q: Float[Array, "B N T K"], k: Float[Array, "B N S K"], v: Float[Array, "B N S K"]
) -> Float[Array, "B N T K"]:
    from jax.experimental.pallas.ops.tpu import flash_attention  # a quarter of a second, of no use elsewhere

    T, S, K = q.shape[2], k.shape[2], q.shape[3]
    if S % LANES:
        # One more channel hides the keys that fill the last block: 1 in queries, HIDDEN in such keys.
        q = jnp.pad(q, _behind(3, 1), constant_values=1)
        k, v = (jnp.pad(jnp.pad(a, _behind(3, 1)), _behind(2, -S % LANES)) for a in (k, v))
        k = k.at[:, :, S:, K].set(HIDDEN)
    if q.shape[3] > LANES:
        q, k, v = (jnp.pad(a, _behind(3, -a.shape[3] % LANES)) for a in (q, k, v))
    q = jnp.pad(q, _behind(2, -T % LANES))
    sizes = block_sizes(q.shape[2], k.shape[2], narrow=q.shape[3] <= LANES)
    return flash_attention.flash_attention(q, k, v, block_sizes=sizes)[:, :, :T, :K]


def _behind(axis: int, count: int) -> list[tuple[int, int]]:
    return [(0, count if i == axis else 0) for i in range(4)]


@functools.cache
def block_sizes(T: int, S: int, narrow: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes

    most = (WIDE_BLOCK, BLOCK // 2, BLOCK, BLOCK) if narrow else (BLOCK // 2,) * 4
    q, k, back_q, back_k = map(_block, (T, S) * 2, most)
    few_k = _block(S, BACK_BLOCK)
    return BlockSizes(
        block_q=q,
        block_k_major=k,
        block_k=k,
        block_b=1,
        block_q_major_dkv=back_q,
        block_k_major_dkv=back_k,
        block_k_dkv=back_k,
        block_q_dkv=back_q,
        block_k_major_dq=few_k,
        block_k_dq=few_k,
        block_q_dq=back_q,
    )


def _block(length: int, most: int) -> int:
    """The largest part, in whole LANES, that divides a length."""
    parts = length // LANES
    return LANES * max(n for n in range(1, most // LANES + 1) if parts % n == 0)
