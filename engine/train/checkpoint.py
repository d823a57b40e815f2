"""Checkpoints of a training run, by Orbax: whole or not at all, written beside the training."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, ArrayLike, UInt32

from engine.parallel import exchanged
from engine.train.step import Tally, TrainState
from engine.types import Params, UserError

BROKEN = "broken-"  # before the name of what could not be read
NO_SPACE = ("No space left on device", "Disk quota exceeded", "File too large")


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
        """Raises UserError where the folder cannot be made, or one of the hosts does not see it."""
        self._folder = folder.absolute()
        make_for_all(self._folder)
        self._policy = NewestAndBest(self._folder, keep_last, keep_best)
        # All hosts go by the names that the first one sees: others would have them save at different steps.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
            single_host_load_and_broadcast=True,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        # Each host reads by itself: in Orbax, those that can read would wait for one that cannot, for ever.
        host = jax.process_index()
        by_itself = ocp.options.MultiprocessingOptions(primary_host=host, active_processes={host})
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=by_itself)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        """Waits until the last checkpoint is whole; UserError where there was no space for it."""
        with self._where_space_ends():
            self._manager.wait_until_finished()
            self._manager.close()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Starts writing; returns before the files are whole. `position`: the data's, and the key's."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        items = _items(state)
        sums = _total(exchanged(_own_sums(items)))
        counted = {name: value.item() for name, value in state.tally._asdict().items()}
        position = {"step": step, **counted, **position, "arrays": _digests(items), "sums": sums}
        self._policy.losses[step] = counted["loss"]
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args["position"] = ocp.args.JsonSave(position | {"digest": _digest(position)})
        with self._where_space_ends():  # of the one before, too
            self._manager.save(step, args=ocp.args.Composite(**args))

    @contextlib.contextmanager
    def _where_space_ends(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of Orbax, TensorStore or the system, in any of their types
            if not any(told in str(error) for told in NO_SPACE):
                raise
            kept = whole_steps(self._folder)
            last = f"that of step {kept[-1]} is whole" if kept else "none is whole yet"
            raise UserError(
                f"no space for a checkpoint in {self._folder}; {last}: free some, and give the command again"
            ) from None

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that can be read, if any, with the shapes, dtypes and devices of `like`.

        A checkpoint that cannot be read, if only by one of several hosts, is told of in one line, and keeps
        its files under another name.

        Args:
          like: of arrays, or of their shapes, which take no memory.

        Raises:
          UserError: the checkpoints are of another model, optimizer or set of averages; or none can be read.
        """
        broken = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._restore(step, like)
            except Broken as error:
                if jax.process_index() == 0:
                    print(f"{self._folder / str(step)} cannot be read {error}", flush=True)
                broken.append(step)
                continue
            if broken:
                self._set_aside(broken)
            return state
        if broken:
            raise UserError(f"no checkpoint in {self._folder} can be read: restore one, or remove the folder")
        return None

    def _restore(self, step: int, like: TrainState) -> TrainState:
        """Of several hosts, all take it or none: Broken or UserError is raised on all of them alike."""
        found, own = self._read(step, like)
        _check(exchanged(own), found)
        position, items = found

        def scalar(name: str, like: Any) -> jax.Array:
            return jax.device_put(np.asarray(position[name], like.dtype), like.sharding)

        tally = Tally(**{name: scalar(name, value) for name, value in like.tally._asdict().items()})
        averages = {name: items[name] for name in like.ema_params}
        return TrainState(scalar("step", like.step), items["params"], averages, items["opt_state"], tally)

    def _read(self, step: int, like: TrainState) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """The position and the items, of which this host reads what is to lie on it; and what it tells the
        others: how that went. Waits for none of them, and raises nothing, or they would wait for ever.
        """
        try:
            position, wanted = self._position(step, like), _items(like)
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
            args = {name: ocp.args.StandardRestore(item) for name, item in shapes.items()}
            read = self._reader.restore(self._folder / str(step), args=ocp.args.Composite(**args))
            items = {name: read[name] for name in wanted}
            return (position, items), {"position": _digest(position), "sums": _own_sums(items)}
        except UserError as error:
            return (None, None), {"mistake": str(error)}
        except Exception as error:  # whatever a torn file makes of Orbax, TensorStore and JSON
            return (None, None), {"problem": _reason(error)}

    def _position(self, step: int, like: TrainState) -> dict[str, Any]:
        """The position of a checkpoint; UserError where it is of another run than `like`."""
        position, digests = _position(self._folder / str(step)), _digests(_items(like))
        if missing := {"step", "sums", "arrays", *Tally._fields} - position.keys():
            raise ValueError(f"position is of another version: it lacks {', '.join(sorted(missing))}")
        if position["arrays"] != digests:
            names = sorted(digests.keys() | position["arrays"].keys())
            others = [name for name in names if digests.get(name) != position["arrays"].get(name)]
            raise UserError(
                f"{self._folder} holds a run with another {', '.join(others)}: give another --workdir, or "
                "the config that it began with"
            )
        return position

    def _set_aside(self, steps: list[int]) -> None:
        """Gives broken checkpoints another name, so that their steps can be saved again."""

        def rename() -> None:
            for step in steps:
                names = itertools.chain([f"{step}"], (f"{step}-{i}" for i in itertools.count(2)))
                free = (self._folder / f"{BROKEN}{name}" for name in names)
                (self._folder / str(step)).rename(next(path for path in free if not path.exists()))

        _by_first(rename, self._folder)
        self._manager.reload()


class Broken(Exception):
    """A checkpoint that cannot be used; says by whom, and why."""


def _check(told: list[dict[str, Any]], found: tuple[Any, Any]) -> None:
    """What the hosts together make of their attempts to read a checkpoint.

    Args:
      told: by each of them, see `Checkpoints._read`.
      found: by this one.

    Raises:
      UserError: it is of another run, for one of them at least.
      Broken: one of them could not read it, or it is not as it was written.
    """
    if mistakes := [each["mistake"] for each in told if "mistake" in each]:
        raise UserError(mistakes[0])
    failed = {host: each["problem"] for host, each in enumerate(told) if "problem" in each}
    if failed:
        host = min(failed)
        who = f"by process {host} " if len(failed) < len(told) else ""
        raise Broken(f"{who}({failed[host]})")
    if len({each["position"] for each in told}) > 1:
        raise Broken("(position is not the same on all hosts)")
    try:
        _compare(found[0], _total([each["sums"] for each in told]))
    except ValueError as error:
        raise Broken(f"({_reason(error)})") from None


def make_for_all(folder: pathlib.Path) -> None:
    """Makes a folder; UserError, on all hosts, where it is not the same folder for all."""
    _by_first(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
    seen = exchanged(folder.is_dir())
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not see {folder}, which process 0 has made: give a --workdir "
            "that all hosts share"
        )


def _by_first(act: Callable[[], Any], folder: pathlib.Path) -> None:
    """The first of the hosts acts, the others wait for it; UserError on all where its disk refuses."""
    problem = ""
    if jax.process_index() == 0:
        try:
            act()
        except OSError as error:
            problem = f"{folder} cannot be written: {error.strerror or error}"
    if problem := exchanged(problem)[0]:
        raise UserError(problem)


def whole_steps(folder: pathlib.Path) -> list[int]:
    """Of which steps there are checkpoints, rising. Those that are being written have other names."""
    return sorted(int(each.name) for each in folder.glob("*") if each.name.isdigit())


def restore_params(folder: pathlib.Path, which: str = "params", step: int | None = None) -> Params:
    """One item of a checkpoint alone, on the first device: "params", or an average such as "ema_0.999".

    Args:
      step: the newest by default.

    Raises:
      UserError: there is no such checkpoint or item, or it cannot be read.
    """
    folder = folder.absolute()
    steps = whole_steps(folder)
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
        _compare(_position(folder / str(step)), _own_sums({which: params}))
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


def _compare(position: dict[str, Any], sums: dict[str, int]) -> None:
    """ValueError where the items' arrays are not those that were written."""
    for name, total in sums.items():
        if position["sums"][name] != total:
            raise ValueError(f"{name} is not as it was written")


def _own_sums(items: dict[str, Any]) -> dict[str, int]:
    """Of each item, a sum of the bits that lie on this host; their `_total` is the same on any number of
    devices and hosts.

    Each device sums what it holds, by one small program for each shape: one for all of the state takes long
    to compile, and small ones that sum over devices make simulated devices wait for each other for ever.
    """
    started = {name: [_shards_bits(leaf) for leaf in jax.tree.leaves(item)] for name, item in items.items()}
    return {
        name: sum((2 * i + 1) * sum(map(int, each)) for i, each in enumerate(found)) % 2**32
        for name, found in jax.device_get(started).items()
    }


def _total(sums: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(each[name] for each in sums) % 2**32 for name in sums[0]}


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
