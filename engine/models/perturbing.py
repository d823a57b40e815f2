"""Perturbed attention (Ahn et al. 2024): rows of a batch in which pixels look at nothing but themselves.

In the layers that are chosen the map of attention is the identity there. What such a network makes of a
picture has its colours, and its forms fall apart: guidance leads away from it (engine.diffusion.guidance).
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Perturbed(NamedTuple):
    """Which rows, in which layers."""

    layers: tuple[str, ...]  # blocks of the network, or layers
    passes: int  # rows of a picture, of which the last but one is perturbed


_perturbed = contextvars.ContextVar[Perturbed | None]("perturbed", default=None)


@contextlib.contextmanager
def perturbing(layers: tuple[str, ...], passes: int) -> Iterator[None]:
    """What is called inside has such rows, if there are `layers`."""
    token = _perturbed.set(Perturbed(layers, passes) if layers else None)
    try:
        yield
    finally:
        _perturbed.reset(token)


def apart(place: str, out: Float[Array, "B T N K"], v: Float[Array, "B T N K"]) -> Float[Array, "B T N K"]:
    """What attention among pixels found, and in perturbed rows the values that it was found among."""
    if (chosen := _perturbed.get()) is None or not is_in(place, chosen.layers):
        return out
    rows = jnp.arange(len(out)) % chosen.passes == chosen.passes - 2
    return jnp.where(rows[:, None, None, None], v, out)


def is_in(place: str, layers: Sequence[str]) -> bool:
    """Whether a place of a network lies in one of these blocks or layers."""
    return any(f"{place}.".startswith(f"{layer}.") for layer in layers)
