"""ControlNets beside a model (engine.models.controlnet): their pictures come in as data, one for each.

What a picture looks like to its network alone is computed once. At each step the network sees the latent,
too, and what it says is added to the U-Net: in all steps, or in those between two noise levels.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from engine.config import check_count
from engine.models.controlnet import Control, ControlNetModel, State
from engine.models.merging import merging
from engine.models.watching import unwatched
from engine.requests import Given, Settings, check_pixels
from engine.types import Latents, UserError
from engine.weights.component import Component


class ControlNet(NamedTuple):
    """One of them."""

    part: Component
    scale: float  # of what it adds
    kind: str = ""  # what it learned to be shown of a picture, where that is known: see engine.sights


def checked(given: Sequence[Given], count: int, settings: Settings) -> None:
    """UserError where there are not as many pictures as ControlNets, or one is of another size."""
    shape = *settings.size, 3
    for each in given:
        check_count("controlnet", len(each.control), count)
        for picture in each.control:
            check_pixels(picture, "control picture")
            if picture.shape != shape:
                raise UserError(f"a control picture of shape {picture.shape}: it must be {shape}")


def pixels(given: Sequence[Given]) -> tuple[UInt8[np.ndarray, "B H W 3"], ...]:
    """A batch of pictures for each ControlNet."""
    return tuple(np.stack(pictures) for pictures in zip(*(each.control for each in given), strict=True))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """What is computed inside is neither watched nor merged, as the U-Net around it may be."""
    with unwatched(), merging(0.0, (0, 0)):
        yield


def said(
    nets: Callable[[], Sequence[ControlNetModel]],
    x: Latents,
    t: Float[Array, " B"],
    reads: Sequence[Any],
    shown: Sequence[Float[Array, "b H W F"]],
    scales: Float[Array, " K"],
    added: Any,
    inside: Bool[Array, ""] | None = None,
) -> Control:
    """What some ControlNets say together.

    Args:
      nets: makes them, where they are used: params that are split come together there.
      x, t, added: as the U-Net takes them.
      reads: the context of each.
      shown: what each makes of its pictures alone; what belongs to a picture stands side by side in x, as in
        edits.seeing.
      inside: where it is false nothing is computed, and zeros are added. None: it is true.
    """

    def near() -> tuple[list[Array], list[State]]:
        each = zip(nets(), reads, shown, scales, strict=True)
        found = [
            net.near(x, t, read, jnp.repeat(seen, len(x) // len(seen), axis=0), scale, added)
            for net, read, seen, scale in each
        ]
        return _total([more for more, _ in found]), [state for _, state in found]

    def deep(states: Sequence[State]) -> tuple[list[Array], Array]:
        each = zip(nets(), states, reads, scales, strict=True)
        return _total([net.deep(state, read, scale) for net, state, read, scale in each])

    def where_inside(compute: Callable[[], Any]) -> Any:
        with _alone():
            if inside is None:
                return compute()
            shapes = jax.eval_shape(compute)
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            return jax.lax.cond(inside, compute, lambda: zeros)

    full_size, states = where_inside(near)
    return Control(full_size, lambda: where_inside(lambda: deep(states)))


def _total(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: sum(arrays[1:], arrays[0]), *trees)
