"""Checkpoints of a training run, by Orbax: whole or not at all, written beside the training."""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, ArrayLike, UInt32

from engine.train.step import Tally, TrainState
from engine.types import Params, UserError

BROKEN = "broken-"  # before the name of what could not be read


@dataclasses.dataclass
class NewestAndBest:
    """Which checkpoints stay, by the losses in their positions: one torn file of Orbax's metrics stops it."""

    folder: pathlib.Path
    last: int
    best: int
    losses: dict[int, float] = dataclasses.field(default_factory=dict)  # step -> loss, as far as known

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(each.step for each in checkpoints)
        kept = {*steps[-self.last :], *sorted(steps, key=self._loss)[: self.best]}
        return [each.step in kept for each in checkpoints]

    def _loss(self, step: int) -> float:
        if step not in self.losses:
            try:
                self.losses[step] = _position(self.folder / str(step))["loss"]
            except (OSError, ValueError):
                self.losses[step] = math.inf
        return self.losses[step]


class Checkpoints:
    """The checkpoints in one folder: the newest ones, and the best ones by the average of the loss.

    Items, each of which can be read without the others: params; the averages, as ema_0.999; opt_state;
    position (JSON: the step, the tally, the data's place; which arrays the items hold, and their sums, so
    that a bit that changed on the disk is noticed).
    """

    def __init__(self, folder: pathlib.Path, keep_last: int = 2, keep_best: int = 0):
        self._folder = folder.absolute()
        self._policy = NewestAndBest(self._folder, keep_last, keep_best)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        """Waits until the last checkpoint is whole."""
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Starts writing; returns before the files are whole. `position`: the data's, and the key's."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        items = _items(state)
        counted = {name: value.item() for name, value in state.tally._asdict().items()}
        position = {"step": step, **counted, **position, "arrays": _digests(items), "sums": _sums(items)}
        self._policy.losses[step] = counted["loss"]
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args["position"] = ocp.args.JsonSave(position | {"digest": _digest(position)})
        self._manager.save(step, args=ocp.args.Composite(**args))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that can be read, if any, with the shapes, dtypes and devices of `like`.

        A checkpoint that cannot be read is told of in one line, and keeps its files under another name.

        Args:
          like: of arrays, or of their shapes, which take no memory.

        Raises:
          UserError: the checkpoints are of another model, optimizer or set of averages; or none can be read.
        """
        broken = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._restore(step, like)
            except UserError:
                raise
            except Exception as error:  # whatever a torn file makes of Orbax, TensorStore and JSON
                print(f"{self._folder / str(step)} cannot be read ({_reason(error)})", flush=True)
                broken.append(step)
                continue
            self._set_aside(broken)
            return state
        if broken:
            raise UserError(f"no checkpoint in {self._folder} can be read: restore one, or remove the folder")
        return None

    def _restore(self, step: int, like: TrainState) -> TrainState:
        position = _position(self._folder / str(step))
        wanted = _items(like)
        if position["arrays"] != (digests := _digests(wanted)):
            names = sorted(digests.keys() | position["arrays"].keys())
            others = [name for name in names if digests.get(name) != position["arrays"].get(name)]
            raise UserError(
                f"{self._folder} holds a run with another {', '.join(others)}: give another --workdir, or "
                "the config that it began with"
            )
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        args = {name: ocp.args.StandardRestore(item) for name, item in shapes.items()}
        items = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        _compare(position, {name: items[name] for name in wanted})

        def scalar(name: str, like: Any) -> jax.Array:
            return jax.device_put(np.asarray(position[name], like.dtype), like.sharding)

        tally = Tally(**{name: scalar(name, value) for name, value in like.tally._asdict().items()})
        averages = {name: items[name] for name in like.ema_params}
        return TrainState(scalar("step", like.step), items["params"], averages, items["opt_state"], tally)

    def _set_aside(self, steps: list[int]) -> None:
        """Gives broken checkpoints another name, so that their steps can be saved again."""
        for step in steps:
            (self._folder / str(step)).rename(self._folder / f"{BROKEN}{step}")
        self._manager.reload()


def restore_params(folder: pathlib.Path, which: str = "params", step: int | None = None) -> Params:
    """One item of a checkpoint alone, on the first device: "params", or an average such as "ema_0.999".

    Args:
      step: the newest by default.

    Raises:
      UserError: there is no such checkpoint or item, or it cannot be read.
    """
    folder = folder.absolute()
    steps = sorted(int(each.name) for each in folder.glob("*") if each.name.isdigit())
    if not steps or step not in (None, *steps):
        raise UserError(f"{folder} has no checkpoint {step or ''}; it has {steps or 'none'}")
    step = steps[-1] if step is None else step
    items = sorted(each.name for each in (folder / str(step)).iterdir() if each.is_dir())
    averages = [name for name in items if name.startswith(("params", "ema_", "power_"))]
    if which not in averages:
        raise UserError(f"{folder / str(step)} has no {which}: write one of {', '.join(averages)}")
    here = SingleDeviceSharding(jax.devices()[0])
    try:
        handlers = {which: ocp.StandardCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(folder, item_handlers=handlers, options=options) as reader:
            tree = reader.item_metadata(step)[which].tree
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
            args = ocp.args.Composite(**{which: ocp.args.StandardRestore(shapes)})
            params = _with_indices(reader.restore(step, args=args)[which])
        _compare(_position(folder / str(step)), {which: params})
        return params
    except Exception as error:  # as in Checkpoints.restore
        raise UserError(f"{folder / str(step) / which} cannot be read ({_reason(error)})") from None


def _items(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, **state.ema_params, "opt_state": state.opt_state}


def _digests(items: dict[str, Any]) -> dict[str, str]:
    """Of each item, what tells its arrays' names, shapes and dtypes from others."""

    def arrays(item: Any) -> list[str]:
        leaves = jax.tree_util.tree_leaves_with_path(item)
        return [f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape}" for path, leaf in leaves]

    return {name: _digest(arrays(item)) for name, item in items.items()}


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _position(folder: pathlib.Path) -> dict[str, Any]:
    """The position of a checkpoint; ValueError where it is not as it was written."""
    position = json.loads((folder / "position" / "metadata").read_text())
    if position.pop("digest", None) != _digest(position):
        raise ValueError("position is not as it was written")
    return position


def _compare(position: dict[str, Any], items: dict[str, Any]) -> None:
    """ValueError where the items' arrays are not those that were written."""
    for name, total in _sums(items).items():
        if position["sums"][name] != total:
            raise ValueError(f"{name} is not as it was written")


def _sums(items: dict[str, Any]) -> dict[str, int]:
    """A sum of the bits of each item, the same on any number of devices and hosts.

    Each device sums what it holds, by one small program for each shape: one for all of the state takes long
    to compile, and small ones that sum over devices make simulated devices wait for each other for ever.
    """
    started = {name: [_shards_bits(leaf) for leaf in jax.tree.leaves(item)] for name, item in items.items()}
    sums = {
        name: sum((2 * i + 1) * sum(map(int, each)) for i, each in enumerate(found)) % 2**32
        for name, found in jax.device_get(started).items()
    }
    if jax.process_count() == 1:
        return sums
    parts = multihost_utils.process_allgather(np.array(list(sums.values()), np.uint32))
    return dict(zip(sums, parts.sum(0, dtype=np.uint32).tolist(), strict=True))


def _shards_bits(x: Array) -> list[Array]:
    """Of the parts of x that lie here, each once."""
    return [
        bits(shard.data, np.array([each.start or 0 for each in shard.index], np.uint32), x.shape)
        for shard in x.addressable_shards
        if shard.replica_id == 0
    ]


@functools.partial(jax.jit, static_argnames="whole")
def bits(x: Array, start: UInt32[ArrayLike, " axes"], whole: tuple[int, ...]) -> UInt32[Array, ""]:
    """sum_i (2i + 1) x_i modulo 2^32, x_i the bits of element i of an array that x is a part of: any one bit
    changes it, as any odd factor leaves it a power of two; so does a change of places, but for those 2^31
    apart.

    Args:
      start: the indices in the whole array of the first element of x.
      whole: the shape of the whole array.
    """
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(whole):
        along = start[axis] + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * jnp.uint32(size) + along
    raw = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    return jnp.sum((2 * index + 1) * raw, dtype=jnp.uint32)


def _with_indices(tree: Any) -> Any:
    """Orbax writes the index of a list as a text: back to a number."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _with_indices(value) for key, value in tree.items()}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
