"""Tokens that are alike attend as one (Bolya & Hoffman 2023, Token Merging for Fast Stable Diffusion).

One token of each 2 x 2 is an anchor. Of the others, those that are most like an anchor join it for the time
of a self-attention, which costs the square of the tokens, and all of them receive what it says. Where the
original draws the anchors by chance, here each is the first of its four: so a picture stays the same.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MOST = 0.75  # of the tokens are no anchors

_chosen: contextvars.ContextVar[tuple[float, tuple[int, int]] | None] = contextvars.ContextVar(
    "merging", default=None
)


@contextlib.contextmanager
def merging(share: float, size: tuple[int, int]) -> Iterator[None]:
    """In what is traced inside, feature maps of that height and width merge a share of their tokens."""
    token = _chosen.set((share, size) if share else None)
    try:
        yield
    finally:
        _chosen.reset(token)


class Merged(NamedTuple):
    """How the tokens of each picture go together."""

    alone: Int[Array, "B U"]  # tokens that stay alone
    joins: Float[Array, "B A T"]  # of each anchor, the weights of the tokens that it is the mean of
    place: Int[Array, "B T"]  # of each token, among those that stay alone and the anchors behind them

    def together(self, x: Float[Array, "B T D"]) -> Float[Array, "B M D"]:
        """Those that stay alone, and behind them the means."""
        alone = jnp.take_along_axis(x, self.alone[..., None], axis=1)
        means = jnp.matmul(self.joins.astype(x.dtype), x, preferred_element_type=jnp.float32)
        return jnp.concatenate([alone, means.astype(x.dtype)], axis=1)

    def apart(self, x: Float[Array, "B M D"]) -> Float[Array, "B T D"]:
        """Every token, with what was said to where it is."""
        return jnp.take_along_axis(x, self.place[..., None], axis=1)


def chosen(height: int, width: int) -> Callable[[Float[Array, "B T D"]], Merged] | None:
    """What merges the tokens of feature maps of that size; None: they stay apart."""
    if _chosen.get() is None:
        return None
    share, size = _chosen.get()
    count = min(int(height * width * share), height * width - (height // 2) * (width // 2))
    if size != (height, width) or not count or min(size) < 2:
        return None
    return functools.partial(merged, height=height, width=width, count=count)


def merged(x: Float[Array, "B T D"], *, height: int, width: int, count: int) -> Merged:
    """Which `count` of the tokens join an anchor: those with the largest cosine to one."""
    anchors, others = _parts(height, width)
    x = x.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    alike = jnp.matmul(x[:, others], x[:, anchors].swapaxes(1, 2))
    order = jnp.argsort(-alike.max(-1), axis=1)  # of the others
    rank = jnp.argsort(order, axis=1)
    nearest = alike.argmax(-1)
    joining = rank < count
    # by token again: the others, then the anchors, in the order in which they stand
    back = np.argsort(np.concatenate([others, anchors]))
    own = jnp.broadcast_to(jnp.arange(len(anchors)), (len(x), len(anchors)))
    alone = len(others) - count
    place = jnp.concatenate([jnp.where(joining, alone + nearest, rank - count), alone + own], axis=1)[:, back]
    joins = (place[:, None] == alone + jnp.arange(len(anchors))[:, None]).astype(jnp.float32)
    joins = joins / joins.sum(-1, keepdims=True)
    return Merged(jnp.asarray(others)[order[:, count:]], joins, place)


def _parts(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Anchors, and all others; where a side is odd its last row or column has no anchor."""
    first = np.zeros((height, width), bool)
    first[: height // 2 * 2 : 2, : width // 2 * 2 : 2] = True
    return np.flatnonzero(first), np.flatnonzero(~first)
