"""One program on every device. The only file that names Mesh, PartitionSpec, shard_map and pmap.

A picture never needs another picture: sampling is a map over the batch, without communication. `Devices`
turns a pure function of (shared, batched) into one that runs on all devices, in one of three modes that
the tests hold equal:

  shard_map  each device runs the function on its own part of the batch (the default)
  jit        the compiler partitions it; the params may be split too, by rules, where one device is too small
  pmap       the older name of the first; kept because many programs speak it

In every mode the params are placed once, when they are loaded, and not at every call.

The devices are those of this process: hosts need not know each other to share a job. Only where a model is
too large for one host do the devices of all hosts form one mesh (mode jit): then every host calls the same
functions in the same order with the same values, and gets all results.
"""

import functools
import json
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from engine.config import nearest
from engine.types import Trouble, UserError

MODES = ("shard_map", "jit", "pmap")

# (pattern of the parameter's dotted path, how its last axes are split over the mesh)
Rules = Sequence[tuple[str, PartitionSpec]]

# Every matrix and kernel by its outputs; the rest is small. Drawing, devices gather what they need when they
# need it; a training step has all of it once, in the dtype that it computes in, and its gradient.
SPLIT: Rules = ((r"\.(kernel|embedding)$", PartitionSpec("data")), (r"", PartitionSpec()))

# On CPUs, convolutions and products are left to Eigen, sums to YNNPACK. XLA prefers the latter for all of it,
# but its convolutions are slow, and it takes those beside its products along: 16 pictures of the model in the
# package took 1.3 times as long.
ON_CPUS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

EXCHANGED = 4096  # bytes: texts that processes exchange are filled up to a multiple

# f(shared, batched) -> batched: every leaf of `batched` has the batch as its first axis
Function = Callable[[Any, Any], Any]


class Devices:
    """The devices that work together, and how."""

    def __init__(
        self,
        mode: str = "shard_map",
        devices: Sequence[jax.Device] | None = None,
        rules: Rules | None = None,
        all_hosts: bool = False,
    ):
        """Takes all local devices, unless told which.

        Args:
          rules: for mode "jit": the first pattern found in a parameter's path says how it is split over
            the axis "data". Every parameter must match one.
          all_hosts: for mode "jit": take the devices of all hosts (see `meet`).

        Raises:
          UserError: an unknown mode, or rules in a mode that cannot split params.
        """
        if mode not in MODES:
            raise UserError(f"parallel={mode!r} is unknown{nearest(mode, MODES)}; write {', '.join(MODES)}")
        if rules is not None and mode != "jit":
            raise UserError(f"sharding rules need parallel='jit', not {mode!r}")
        if all_hosts and mode != "jit":
            raise UserError(f"devices of several hosts need parallel='jit', not {mode!r}")
        self.mode = mode
        self.rules = rules
        self.devices = list(devices or (jax.devices() if all_hosts else jax.local_devices()))
        self.mesh = Mesh(np.array(self.devices), ("data",), axis_types=(AxisType.Auto,))
        self._whole = NamedSharding(self.mesh, PartitionSpec())
        self._split = NamedSharding(self.mesh, PartitionSpec("data"))
        self.compiler_options = options_for(self.platform)
        self._gather = jax.jit(lambda tree: tree, out_shardings=self._whole)
        self._any = jax.jit(jnp.any, out_shardings=self._whole)

    @property
    def count(self) -> int:
        return len(self.devices)

    @property
    def platform(self) -> str:
        """What they are: "cpu", "gpu", "tpu"."""
        return self.devices[0].platform

    @property
    def alone(self) -> bool:
        """Whether no other host has a part in what these devices do."""
        return self._whole.is_fully_addressable

    @property
    def leads(self) -> bool:
        """Whether this host is the one that writes what these devices make."""
        return self.alone or jax.process_index() == 0

    def place(self, name: str, array: np.ndarray) -> jax.Array:
        """Puts the parameter `name` (a dotted path) where it stays: on all devices, or split by the rules."""
        return _put(array, self.sharding(name, array.shape))

    def place_tree(self, tree: Any, dtype: np.dtype | None = None) -> Any:
        """The same for every leaf of a tree, whose path is its name.

        dtype: cast to this, one leaf after another, where it lies; None: as they are.
        """

        def put(leaf: Any, sharding: Sharding) -> Any:
            placed = _put(leaf, sharding)
            return placed if dtype in (None, placed.dtype) else placed.astype(dtype)

        return jax.tree.map(put, tree, self.shardings(tree))

    def shardings(self, tree: Any) -> Any:
        """Where each leaf of a tree of arrays or shapes stays, by its path."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: self.sharding(jax.tree_util.keystr(path, simple=True, separator="."), x.shape),
            tree,
        )

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where the parameter `name` stays. An axis that the devices do not divide stays whole."""
        if self.rules is None:
            return self._whole
        spec = spec_for(name, self.rules)
        parts = [None] * (len(shape) - len(spec)) + list(spec)
        fits = (n % self.count == 0 for n in shape)
        parts = [part if fit else None for part, fit in zip(parts, fits, strict=True)]
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    def whole(self, tree: Any, parts: Any = None, after: Any = None) -> Any:
        """Inside a program of mode "jit": params that are split, whole on each device.

        Without it the compiler is free to move pictures instead of params, and does: it computed attention on
        other devices than the convolutions around it, and moved ten times as many bytes.

        Args:
          parts: where each of them stays (see `shardings`), if there are gradients, which are to come there.
          after: arrays that must be known first. In a loop, those that change: else the compiler brings the
            params together before the loop, and keeps them whole all the while.
        """
        if self.rules is None:
            return tree
        if after is not None:
            tree, _ = jax.lax.optimization_barrier((tree, after))
        if parts is not None:
            # A gradient goes the way back: it is summed on all devices, and then in parts. Without the first,
            # the derivative of a convolution is computed in as many pieces as there are devices.
            tree = jax.lax.with_sharding_constraint(tree, parts)
        return jax.lax.with_sharding_constraint(tree, self._whole)

    def share(self, tree: Any) -> Any:
        """Copies small values (sigmas, a scale) to all devices."""
        return _put(tree, self._whole)

    def shard_batch(self, tree: Any) -> Any:
        """Splits the first axis of every leaf over the devices."""
        return _put(tree, self._split)

    def shard_own(self, tree: Any) -> Any:
        """The same where each host has its own part of the batch, in the order of the hosts."""
        if self.alone:
            return self.shard_batch(tree)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._split, x), tree)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Where `shard_batch` puts things."""
        return self._split

    @property
    def whole_sharding(self) -> NamedSharding:
        """Where `share` puts things."""
        return self._whole

    def fetch(self, tree: Any) -> Any:
        """Copies results to the host, those of the other hosts included. Waits for them.

        One array after the other: devices that keep parts of a model have no room for all of it.
        """
        return jax.tree.map(lambda x: np.asarray(self.gather(x)), tree)

    def gather(self, tree: Any) -> Any:
        """Results such that each host can read all of them; does not wait."""
        return tree if self.alone else self._gather(tree)

    def agree(self, value: np.ndarray) -> np.ndarray:
        """The value that the first host has, on all hosts."""
        return value if self.alone else multihost_utils.broadcast_one_to_all(value)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some host. All hosts must ask. Waits for them."""
        return bool(self.ask(flag))

    def ask(self, flag: bool) -> bool | Array:
        """The same; does not wait: the devices find the answer when they have done what they had to do."""
        if self.alone:
            return flag
        own = np.full(len(self.mesh.local_devices), flag)
        return self._any(jax.make_array_from_process_local_data(self._split, own))

    def map(self, f: Function) -> Function:
        """`f`, compiled to run on every device at once.

        Call the result with `shared` from `place` and `share`, and with a batch that the number of devices
        divides (see `pad`). Its `lower(shared, batched)` is that of jax.jit: the program, to look at.
        """
        if self.mode == "pmap":
            return Pmapped(f, self.devices, self.compiler_options)
        if self.mode == "jit":
            return jax.jit(f, out_shardings=self._split, compiler_options=self.compiler_options)
        specs = (PartitionSpec(), PartitionSpec("data"))
        # Nothing is reduced over devices, so there is nothing for the varying-axes check to find.
        mapped = jax.shard_map(
            f, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False
        )
        return jax.jit(mapped, compiler_options=self.compiler_options)

    def over_batch(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Inside a program of `map`: `f` of arrays, applied to each device's own part of the batch.

        For kernels, which the compiler cannot partition. In two of the modes a program sees no more.
        """
        if self.mode != "jit":
            return f
        split = PartitionSpec("data")
        return jax.shard_map(f, mesh=self.mesh, in_specs=split, out_specs=split, check_vma=False)


@functools.cache
def options_for(platform: str) -> dict[str, str] | None:
    """What the compiler is told for a platform, in the `compiler_options` of jax.jit."""
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=ON_CPUS).lower().compile()
    except jax.errors.JaxRuntimeError:  # this jaxlib has no such option
        return None
    return ON_CPUS


def exchanged(told: Any) -> list[Any]:
    """What each of the processes that have met tells, in their order. All must call it. Waits for them.

    Args:
      told: what JSON knows.
    """
    if jax.process_count() == 1:
        return [told]
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    size = longest + -longest % EXCHANGED  # not a program for each length
    texts = multihost_utils.process_allgather(np.pad(text, (0, size - len(text)), constant_values=ord(" ")))
    return [json.loads(each.tobytes()) for each in texts]


def meet(coordinator: str | None, processes: int, process_id: int) -> None:
    """Joins the processes of a job, so that their devices can work on one batch. Before any JAX call.

    What SIGTERM does remains as it was. To be called in the main thread.

    Args:
      coordinator: host:port of process 0; None: what the cluster says.

    Raises:
      UserError: the others cannot be found; Trouble where that may pass.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(coordinator, processes, process_id, gpus_of_node())
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        # of the network, or of a host that is not up yet: the same command may go well later
        passing = isinstance(error, jax.errors.JaxRuntimeError)
        later = "the same command may go well later, or " if passing else ""
        raise (Trouble if passing else UserError)(
            f"the {processes} processes did not find each other ({reason}); {later}write --coordinator "
            "HOST:PORT of process 0"
        ) from None
    finally:
        # JAX has put a handler of its own in its place, for a service that nothing here asks.
        if on_sigterm is not None:  # or it was none of Python's
            signal.signal(signal.SIGTERM, on_sigterm)


def gpus_of_node(environ: Mapping[str, str] = os.environ) -> list[int] | None:
    """The GPUs that this process is to have, where it is the only task of its node: all.

    None leaves it to JAX, which gives each task of SLURM and Open MPI the one GPU of its number, the only
    task of a node, too.
    """
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    if not re.fullmatch(r"1(\(x\d+\))?", tasks):
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    return list(range(count)) or None


def _put(tree: Any, sharding: Sharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


class Pmapped:
    """A pmapped function behind the face of a jitted one: its batches come and go with one batch axis."""

    def __init__(self, f: Function, devices: Sequence[jax.Device], compiler_options: dict[str, str] | None):
        self._mapped: Any = jax.pmap(f, in_axes=(None, 0), devices=devices)
        if compiler_options:
            self._mapped = jax.jit(self._mapped, compiler_options=compiler_options)
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
