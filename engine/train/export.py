"""A model from the checkpoints of a run, at any time: raw params or any of their averages."""

import pathlib
from typing import Any

from engine.config import FinetuneConfig, StageConfig
from engine.train import ema, finetune, stages
from engine.train.checkpoint import restore_params
from engine.train.workdir import STAGE, recall
from engine.types import Params, UserError


def export(
    workdir: pathlib.Path,
    out: pathlib.Path,
    which: str = "",
    step: int | None = None,
    sigma_rel: float | None = None,
) -> pathlib.Path:
    """Writes the model of a run in the diffusers layout, or the file of a LoRA or a word.

    Args:
      which: of the last stage: "params", or an average such as "ema_0.999"; none: what the run ends with.
      step: of its checkpoint; None: the newest.
      sigma_rel: in place of `which`: the power-function average of this width, made from the snapshots.

    Raises:
      UserError: there is no run, no such checkpoint or average, or the folder exists.
    """
    if sigma_rel is not None and which:
        raise UserError("--which and --sigma_rel name two averages; leave out one")
    config = recall(workdir)
    if isinstance(config, FinetuneConfig):
        task = finetune.begin(config)
        params = _params(workdir / STAGE, config.finetune, which, step, sigma_rel)
        return finetune.export(task, params, out, overwrite=False)

    def restored(name: str, *arguments: Any, **_: Any) -> Params:
        stage: StageConfig = arguments[4]
        if name != "diffusion":
            return _params(workdir / name, stage, "", None, None)
        return _params(workdir / name, stage, which, step, sigma_rel)

    model = stages.build(config, workdir, restored)
    assert model is not None
    return stages.export(model, out, overwrite=False)


def _params(
    folder: pathlib.Path, stage: StageConfig, which: str, step: int | None, sigma_rel: float | None
) -> Params:
    if sigma_rel is None:
        return restore_params(folder, which or ema.chosen(stage), step)
    kept = ema.snapshots(folder / "ema")
    if not kept:
        raise UserError(f"{folder / 'ema'} has no snapshots: train with ema_sigma_rel and ema_snapshot_every")
    return ema.reconstruct(kept, sigma_rel, kept[-1].step if step is None else step)
