"""Does each objective learn? The U-Net of configs/scenes.py, from fresh weights, some steps of each.

  python -m tests.train.every_objective [--steps 200] [--batch_size 8] [--workdir runs/objectives]

The autoencoder and the text encoder are those of the model in the package. Prints the loss over the first and
over the last tenth of the steps, and draws WORKDIR/objectives.png. What was trained already is not trained
again. Exit code: 1 where a loss did not fall.
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from configs import scenes
from engine.config import TrainConfig
from engine.loading import SHIPPED
from engine.train import plot, progress, stages
from engine.weights.folder import load_folder, save_folder

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
WEIGHTINGS = ("uniform", "min_snr", "p2")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
}


def objectives() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """name -> (the scheduler's options, the stage's)"""
    found = {}
    for weighting in WEIGHTINGS:
        for name, prediction in PREDICTIONS.items():
            found[f"{name}, {weighting}"] = {"prediction_type": prediction}, {"weighting": weighting}
        found[f"flow, {weighting}"] = FLOW, {"weighting": weighting}
    own = {"noise_offset": 0.1, "time_sampling": "uniform"}
    found["v, zero terminal SNR, noise offset, uniform times"] = ZERO_SNR, own
    return found


def begin(folder: pathlib.Path) -> pathlib.Path:
    """The model in the package, with a fresh U-Net."""
    if not folder.exists():
        model = load_folder(SHIPPED)
        config = scenes.get_config()
        fresh = stages.components(config, model.tokenizer)["unet"]
        save_folder(folder, dataclasses.replace(model, unet=fresh), dtype=jnp.float32)
    return folder


def config_of(
    start: pathlib.Path, steps: int, batch_size: int, scheduler: dict[str, Any], options: dict[str, Any]
) -> TrainConfig:
    config = scenes.get_config()
    own = scheduler if "_class_name" in scheduler else {**config.scheduler, **scheduler}
    optim = dataclasses.replace(config.diffusion.optim, warmup_steps=20, decay_steps=steps // 2)
    stage = dataclasses.replace(
        config.diffusion, steps=steps, batch_size=batch_size, easy=0.0, easy_steps=0, optim=optim, **options
    )
    config = dataclasses.replace(config, start=str(start), scheduler=own, diffusion=stage)
    config.autoencoder.steps = config.words.steps = config.decoder.steps = 0
    return config


def curve(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The steps, and the mean loss since the line before."""
    lines = plot.lines_of(workdir, "diffusion")
    losses = [np.sum(line["loss_by_time"]) / np.sum(line["count_by_time"]) for line in lines]
    return np.array([line["step"] for line in lines]), np.array(losses)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/objectives"))
    given = parser.parse_args()
    progress.REPORT_SECONDS = 1.0
    start, curves = begin(given.workdir / "start"), {}
    for number, (name, options) in enumerate(objectives().items()):
        config = config_of(start, given.steps, given.batch_size, *options)
        workdir = given.workdir / f"{number:02}"
        print(f"{name}:", flush=True)
        if stages.train(config, workdir) is None:
            return 130
        curves[name] = curve(workdir)
    tenth, fell = given.steps // 10, True
    print(f"{'objective':50}  first tenth  last tenth")
    for name, (steps, losses) in curves.items():
        first, last = losses[steps <= tenth].mean(), losses[steps > given.steps - tenth].mean()
        fell &= bool(last < first)
        print(f"{name:50}  {first:11.4f}  {last:10.4f}{'' if last < first else '  did not fall'}")
    draw(curves, given.workdir / "objectives.png")
    return 0 if fell else 1


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(14, 10), layout="constrained")
    axes = list(figure.subplots(4, 4).flat)
    for axis in axes:
        axis.set_visible(False)
    for axis, (name, (steps, losses)) in zip(axes, curves.items(), strict=False):
        axis.set_visible(True)
        axis.plot(steps, losses)
        axis.set_title(name, fontsize=9)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    sys.exit(main())
