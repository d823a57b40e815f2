"""ControlNets beside a model (engine.models.controlnet): their pictures come in as data, one for each.

What a picture looks like to its network alone is computed once. At each step the network sees the latent,
too, and what it says is added to the U-Net: in all steps, or in those between two noise levels.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt8

from engine.models.controlnet import Control
from engine.models.merging import merging
from engine.models.watching import unwatched
from engine.requests import Given, Settings
from engine.types import UserError
from engine.weights.component import Component


class ControlNet(NamedTuple):
    """One of them."""

    part: Component
    scale: float  # of what it adds


def checked(given: Sequence[Given], count: int, settings: Settings) -> None:
    """UserError where there are not as many pictures as ControlNets, or one is of another size."""
    shape = settings.height, settings.width, 3
    for each in given:
        if len(each.control) != count:
            raise UserError(_wrong_count(len(each.control), count))
        for picture in each.control:
            if picture.shape != shape:
                raise UserError(f"a control picture of shape {picture.shape}: it must be {shape}")


def _wrong_count(found: int, count: int) -> str:
    if not count:
        return "a picture for a ControlNet, and there is none: write --controlnet FOLDER, too"
    if not found:
        one = "FILE" if count == 1 else ",".join(["FILE"] * count)
        return f"a ControlNet without a picture to see: write --control_image {one}"
    return f"{found} control pictures for {count} ControlNets: write one for each, with commas between them"


def pixels(given: Sequence[Given]) -> tuple[UInt8[np.ndarray, "B H W 3"], ...]:
    """A batch of pictures for each ControlNet."""
    return tuple(np.stack(pictures) for pictures in zip(*(each.control for each in given), strict=True))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What is computed inside is neither watched nor merged, as the U-Net around it may be."""
    with unwatched(), merging(0.0, (0, 0)):
        yield


def apart(compute: Callable[[], Control]) -> Control:
    """What ControlNets say, `alone` whenever it is computed."""
    with alone():
        control = compute()

    def deep():
        with alone():
            return control.deep()

    return Control(control.full_size, deep)


def in_part(compute: Callable[[], Control], inside: Bool[Array, ""]) -> Control:
    """The same where `inside`, and elsewhere zeros, for which nothing is computed."""

    def everything():
        control = compute()
        return control.full_size, control.deep()

    def nothing():
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(everything))

    with alone():
        full_size, deep = jax.lax.cond(inside, everything, nothing)
    return Control(full_size, lambda: deep)
