"""Which word steers what: how much each place of a picture attends to each token (Tang et al. 2022, DAAM)."""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Watch:
    """What the attention to words says while a network is traced."""

    def __init__(self):
        self.size = (0, 0)  # of the feature map that is at work
        self._seen: list[tuple[tuple[int, int], Array]] = []

    def see(self, q: Float[Array, "B T N K"], k: Float[Array, "B S N K"]) -> None:
        """Takes in a layer: the weights of all its heads. Not where tokens are merged: they have no place."""
        if q.shape[1] != math.prod(self.size):
            return
        scores = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5)
        self._seen.append((self.size, weights.mean(1)))

    def mean(self, height: int, width: int) -> Float[Array, "B H W S"]:
        """The mean of all layers, each brought to this size. The shares of all tokens in a place sum to 1."""
        maps = [
            jax.image.resize(w.reshape(len(w), *size, -1), (len(w), height, width, w.shape[-1]), "linear")
            for size, w in self._seen
        ]
        return sum(maps[1:], maps[0]) / len(maps)


_watch: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("watch", default=None)


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watches the networks that are called inside, in one trace: what is seen must not leave it."""
    token = _watch.set(Watch())
    try:
        yield _watch.get()
    finally:
        _watch.reset(token)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Nobody watches what is called inside."""
    token = _watch.set(None)
    try:
        yield
    finally:
        _watch.reset(token)


def at(height: int, width: int) -> None:
    """Says of what size the feature map is that attends next."""
    if (watch := _watch.get()) is not None:
        watch.size = (height, width)


def see(q: Float[Array, "B T N K"], k: Float[Array, "B S N K"]) -> None:
    """Shows a layer that attends to words to whoever watches."""
    if (watch := _watch.get()) is not None:
        watch.see(q, k)
