"""One program on every device. The only file that names Mesh, PartitionSpec, shard_map and pmap.

A picture never needs another picture: sampling is a map over the batch, without communication. `Devices`
turns a pure function of (shared, batched) into one that runs on all devices, in one of three modes that
the tests hold equal:

  shard_map  each device runs the function on its own part of the batch (the default)
  jit        the compiler partitions it; the params may be split too, by rules, where one device is too small
  pmap       the older name of the first; kept because many programs speak it

In every mode the params are placed once, when they are loaded, and not at every call.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from engine.config import nearest
from engine.types import UserError

MODES = ("shard_map", "jit", "pmap")

# (pattern of the parameter's dotted path, how its axes are split over the mesh)
Rules = Sequence[tuple[str, PartitionSpec]]

# f(shared, batched) -> batched: every leaf of `batched` has the batch as its first axis
Function = Callable[[Any, Any], Any]


class Devices:
    """The devices that work together, and how."""

    def __init__(
        self,
        mode: str = "shard_map",
        devices: Sequence[jax.Device] | None = None,
        rules: Rules | None = None,
    ):
        """Takes all local devices, unless told which.

        Args:
          rules: for mode "jit": the first pattern found in a parameter's path says how it is split over
            the axis "data". Every parameter must match one.

        Raises:
          UserError: an unknown mode, or rules in a mode that cannot split params.
        """
        if mode not in MODES:
            raise UserError(f"parallel={mode!r} is unknown{nearest(mode, MODES)}; write {', '.join(MODES)}")
        if rules is not None and mode != "jit":
            raise UserError(f"sharding rules need parallel='jit', not {mode!r}")
        self.mode = mode
        self.rules = rules
        self.devices = list(devices or jax.local_devices())
        self.mesh = Mesh(np.array(self.devices), ("data",), axis_types=(AxisType.Auto,))
        self._whole = NamedSharding(self.mesh, PartitionSpec())
        self._split = NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def count(self) -> int:
        return len(self.devices)

    def place(self, name: str, array: np.ndarray) -> jax.Array:
        """Puts the parameter `name` (a dotted path) where it stays: on all devices, or split by the rules."""
        sharding = self._whole
        if self.rules is not None:
            sharding = NamedSharding(self.mesh, spec_for(name, self.rules))
        return jax.device_put(array, sharding)

    def share(self, tree: Any) -> Any:
        """Copies small values (sigmas, a scale) to all devices."""
        return jax.device_put(tree, self._whole)

    def shard_batch(self, tree: Any) -> Any:
        """Splits the first axis of every leaf over the devices."""
        return jax.device_put(tree, self._split)

    def map(self, f: Function) -> Function:
        """`f`, compiled to run on every device at once.

        Call the result with `shared` from `place` and `share`, and with a batch that the number of devices
        divides (see `pad`). Its `lower(shared, batched)` is that of jax.jit: the program, to look at.
        """
        if self.mode == "pmap":
            return Pmapped(f, self.devices)
        if self.mode == "jit":
            return jax.jit(f, out_shardings=self._split)
        specs = (PartitionSpec(), PartitionSpec("data"))
        # Nothing is reduced over devices, so there is nothing for the varying-axes check to find.
        mapped = jax.shard_map(
            f, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False
        )
        return jax.jit(mapped)


class Pmapped:
    """A pmapped function behind the face of a jitted one: its batches come and go with one batch axis."""

    def __init__(self, f: Function, devices: Sequence[jax.Device]):
        self._mapped = jax.pmap(f, in_axes=(None, 0), devices=devices)
        self._count = len(devices)

    def __call__(self, shared: Any, batched: Any) -> Any:
        split = self._mapped(shared, jax.tree.map(self._split, batched))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), split)

    def lower(self, shared: Any, batched: Any) -> jax.stages.Lowered:
        return self._mapped.lower(shared, jax.tree.map(self._split, batched))

    def _split(self, x: Array) -> Array:
        return x.reshape(self._count, x.shape[0] // self._count, *x.shape[1:])


def spec_for(name: str, rules: Rules) -> PartitionSpec:
    """The first rule whose pattern is found in `name`; UserError if there is none."""
    for pattern, spec in rules:
        if re.search(pattern, name):
            return spec
    raise UserError(
        f"no sharding rule matches the parameter {name}: add one, such as ('.*', PartitionSpec())"
    )


def pad(array: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row until there are `size`; callers cut the results back."""
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
