"""Checkpoints of a training run, by Orbax: whole or not at all, written beside the training."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from engine.train.step import TrainState


class Checkpoints:
    """The checkpoints in one folder. Items: params, ema_params, opt_state, position (JSON)."""

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Starts writing; returns before the files are whole. `position`: the data's, and the key's."""
        step = int(state.step)
        if step == self.latest():
            return
        save = ocp.args.StandardSave
        items = ocp.args.Composite(
            params=save(state.params),
            ema_params=save(state.ema_params),
            opt_state=save(state.opt_state),
            position=ocp.args.JsonSave({"step": step, **position}),
        )
        self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, with the shapes, dtypes and devices of `like`, and its position."""

        def restore(item: Any):
            return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, item))

        items = self._manager.restore(
            self.latest(),
            args=ocp.args.Composite(
                params=restore(like.params),
                ema_params=restore(like.ema_params),
                opt_state=restore(like.opt_state),
                position=ocp.args.JsonRestore(),
            ),
        )
        position = items.position
        step = jax.device_put(np.asarray(position["step"], like.step.dtype), like.step.sharding)
        return TrainState(step, items.params, items.ema_params, items.opt_state), position

    def close(self) -> None:
        """Waits until the last checkpoint is whole."""
        self._manager.wait_until_finished()
        self._manager.close()
