"""Checkpoints of a training run, by Orbax: whole or not at all, written beside the training."""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from engine.train.step import Tally, TrainState
from engine.types import Params, UserError

BROKEN = "broken-"  # before the name of what could not be read


class Checkpoints:
    """The checkpoints in one folder: the newest ones, and the best ones by the average of the loss.

    Items, each of which can be read without the others: params; the averages, as ema_0.999; opt_state;
    position (JSON: the step, the tally, the data's place, and which arrays the items hold).
    """

    def __init__(self, folder: pathlib.Path, keep_last: int = 2, keep_best: int = 0):
        self._folder = folder.absolute()
        newest = checkpoint_managers.LatestN(keep_last)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["loss"],
            reverse=True,  # the lowest come last, and the last are kept
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=True,
        )
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
        position = {"step": step, **counted, **position, "arrays": _digests(items)}
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args["position"] = ocp.args.JsonSave(position)
        self._manager.save(step, args=ocp.args.Composite(**args), metrics={"loss": counted["loss"]})

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that can be read, if any, with the shapes, dtypes and devices of `like`.

        A checkpoint that cannot be read is told of in one line, and keeps its files under another name.

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
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        position = self._manager.restore(step, args=args).position
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

        def scalar(name: str, like: jax.Array) -> jax.Array:
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
        with ocp.StandardCheckpointer() as reader:
            found = reader.metadata(folder / str(step) / which).item_metadata
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), found.tree)
            return _with_indices(reader.restore(folder / str(step) / which, shapes))
    except Exception as error:  # as in Checkpoints.restore
        raise UserError(f"{folder / str(step) / which} cannot be read ({_reason(error)})") from None


def _items(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, **state.ema_params, "opt_state": state.opt_state}


def _digests(items: dict[str, Any]) -> dict[str, str]:
    """Of each item, what tells its arrays' names, shapes and dtypes from others."""

    def digest(item: Any) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(item)
        told = [f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape}" for path, leaf in leaves]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    return {name: digest(item) for name, item in items.items()}


def _with_indices(tree: Any) -> Any:
    """Orbax writes the index of a list as a text: back to a number."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _with_indices(value) for key, value in tree.items()}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
