"""ControlNets and T2I-Adapters beside a model (engine.models): their pictures come in as data, one for each.

What a picture looks like to its network alone is computed once. Of an adapter that is all; a ControlNet sees
the latent, too, at each step. What they say is added to the U-Net: in all steps, or in those between two
noise levels.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from engine.config import check_count, control_mode
from engine.models.controlnet import Control, ControlNetConfig, ControlNetModel, Look, State
from engine.models.merging import merging
from engine.models.perturbing import perturbing
from engine.models.t2i_adapter import Features, T2IAdapterConfig
from engine.models.watching import unwatched
from engine.requests import Given, Settings, check_pixels
from engine.types import Latents, UserError
from engine.weights.component import Component
from engine.weights.controlnet import find, kind_of, kinds_known

Seen = tuple[Float[Array, "b _ _ _"], ...]  # Features of the pictures


class ControlNet(NamedTuple):
    """One of them, of either kind."""

    part: Component
    scale: float  # of what it adds
    kind: str = ""  # what it learned to be shown of a picture, where that is known: see engine.sights
    pictures: tuple[int, ...] = ()  # which of those that are given it sees; none: the one in its own place
    modes: tuple[int, ...] = ()  # of a union, which kind each of them is of,
    scales: tuple[float, ...] = ()  # and where it sees several, how much of each


def gathered(
    entries: Sequence[tuple[str | os.PathLike, float]],
    modes: Sequence[str | int],
    read: Callable[[str | os.PathLike], Component],
) -> list[ControlNet]:
    """The networks that entries name. Those that name the same union are one network, which sees several.

    Args:
      entries: paths and scales.
      modes: for each entry that is a union, in their order, of which kind its picture is.
      read: makes one of a path.

    Raises:
      UserError: see `check_modes`.
    """
    left = map(control_mode, modes)
    mode_of = {place: next(left) for place, (path, _) in enumerate(entries) if kinds_known(path)}
    alike: dict[Any, list[int]] = {}
    for place, (path, _) in enumerate(entries):
        alike.setdefault(find(path) if place in mode_of else place, []).append(place)
    nets = []
    for own in alike.values():
        path, _ = entries[own[0]]
        scales = tuple(float(entries[place][1]) for place in own)
        known = tuple(mode_of[place] for place in own if place in mode_of)
        scale = scales[0] if len(own) == 1 else 1.0  # of several, each has its own
        nets.append(ControlNet(read(path), scale, kind_of(path), tuple(own), known, scales))
    return nets


def check_modes(paths: Sequence[str | os.PathLike], modes: Sequence[str | int]) -> None:
    """UserError unless there are as many modes as unions, which know such kinds."""
    unions = [path for path in paths if kinds_known(path)]
    if len(unions) > len(modes):
        raise UserError(
            f"{unions[len(modes)]} sees many kinds of pictures (a union): say of which its own is, as "
            "control_mode canny, depth or openpose"
        )
    if len(unions) < len(modes):
        told = ",".join(map(str, modes))
        raise UserError(f"control_mode={told}: it is for ControlNet unions, of which {len(unions)} are named")
    for path, mode in zip(unions, modes, strict=True):
        known = kinds_known(path)
        if control_mode(mode) not in range(known):
            raise UserError(f"control_mode={mode}: {path} knows {known} kinds of pictures, from 0")


def places(nets: Sequence[ControlNet]) -> list[tuple[int, ...]]:
    """Of each, which of the pictures that are given it sees."""
    return [net.pictures or (place,) for place, net in enumerate(nets)]


def count(nets: Sequence[ControlNet]) -> int:
    """How many pictures they see."""
    return sum(map(len, places(nets)))


def kinds(nets: Sequence[ControlNet]) -> tuple[str, ...]:
    """What they learned to be shown of each picture."""
    each = {place: net.kind for net, own in zip(nets, places(nets), strict=True) for place in own}
    return tuple(each[place] for place in sorted(each))


def looked(net: ControlNet, network: Any, pictures: Sequence[Float[Array, "B H W 3"]]) -> Look | Seen:
    """What a network makes of its own pictures, 0 to 1, alone."""
    if net.modes:
        return network.look_at(pictures, net.modes, net.scales)
    (picture,) = pictures
    return network.look(picture)


def at_each_step(nets: Sequence[ControlNet]) -> list[int]:
    """Which of them look at the latent, too: not the T2I-Adapters."""
    return [i for i, net in enumerate(nets) if isinstance(net.part.config, ControlNetConfig)]


def cell(nets: Sequence[ControlNet]) -> int:
    """Pixels a side of what adapters see as one place: the sides of their pictures are multiples of it."""
    configs = (net.part.config for net in nets)
    return math.lcm(*(each.downscale_factor for each in configs if isinstance(each, T2IAdapterConfig)))


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
    """What is computed inside is neither watched, merged nor perturbed, as the U-Net around it may be."""
    with unwatched(), merging(0.0, (0, 0)), perturbing((), 1):
        yield


def said(
    nets: Callable[[], Sequence[ControlNetModel]],
    x: Latents,
    t: Float[Array, " B"],
    reads: Sequence[Any],
    shown: Sequence[Look | Seen],
    scales: Float[Array, " K"],
    added: Any,
    inside: Bool[Array, ""] | None = None,
) -> Control:
    """What some ControlNets and T2I-Adapters say together.

    Args:
      nets: makes the ControlNets, where they are used: params that are split come together there.
      x, t, added: as the U-Net takes them.
      reads: the context of each ControlNet.
      shown: what each of both makes of its pictures alone, the adapters' all that they say; what belongs to
        a picture stands side by side in x, as in edits.seeing.
      scales: of each of both.
      inside: where it is false nothing is computed, and zeros are added. None: it is true.
    """
    pairs = list(zip(shown, scales, strict=True))
    features = _features([pair for pair in pairs if not isinstance(pair[0], Look)], len(x), inside)
    others = [pair for pair in pairs if isinstance(pair[0], Look)]
    if not others:
        return Control([], None, features)
    looks, weights = zip(*others, strict=True)

    def near() -> tuple[list[Array], list[State]]:
        each = zip(nets(), reads, looks, weights, strict=True)
        found = [
            net.near(x, t, read, _repeated(seen, len(x)), scale, added) for net, read, seen, scale in each
        ]
        return _total([more for more, _ in found]), [state for _, state in found]

    def deep(states: Sequence[State]) -> tuple[list[Array], Array]:
        each = zip(nets(), states, reads, weights, strict=True)
        return _total([net.deep(state, read, scale) for net, state, read, scale in each])

    def where_inside(compute: Callable[[], Any]) -> Any:
        with _alone():
            if inside is None:
                return compute()
            shapes = jax.eval_shape(compute)
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            return jax.lax.cond(inside, compute, lambda: zeros)

    full_size, states = where_inside(near)
    return Control(full_size, lambda: where_inside(lambda: deep(states)), features)


def _repeated(seen: Look, rows: int) -> Look:
    """The same for as many rows, of which those of a picture stand side by side."""
    return jax.tree.map(lambda array: jnp.repeat(array, rows // len(array), axis=0), seen)


def _features(
    adapted: Sequence[tuple[Seen, Float[Array, ""]]], rows: int, inside: Bool[Array, ""] | None
) -> Features:
    """What adapters add to as many rows: for each level the sum over those that reach it."""
    each = []
    for features, scale in adapted:
        scale = scale if inside is None else jnp.where(inside, scale, 0)
        each.append([jnp.repeat(f, rows // len(f), axis=0) * scale.astype(f.dtype) for f in features])
    levels = itertools.zip_longest(*each)
    return tuple(_total([f for f in level if f is not None]) for level in levels)


def _total(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: sum(arrays[1:], arrays[0]), *trees)
