"""Trains the probe that launch.evaluate reads pictures of the drawn world with.

  python -m launch.probe --workdir=runs/probe
  python -m launch.probe --workdir=runs/better --start runs/probe/probe.safetensors --steps 3000

It learns from renders alone, two minutes on an H100, hours on a few CPU cores; the same command goes on where
it was stopped. At the end WORKDIR/probe.safetensors is written, and the shares of right answers about
renders that it never saw go to stdout.

Exit code: 0 trained; 2 a mistake, explained in one line; 130 stopped and saved.
"""

import pathlib
from collections.abc import Sequence

from engine.config import StageConfig
from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What": {
        "workdir": ("FOLDER", "for checkpoints, metrics and the probe"),
        "start": ("FILE", "a probe to train further, at half the rate and on other renders"),
        "steps": ("N", "of 64 renders each"),
        "seed": ("N", "of its first weights and of the renders: for one that another is held against"),
        "tellers": ("N", "processes that tell the scenes, for a GPU or TPU; 0: none but this one"),
        "test_renders": ("N", "fresh pictures that it is examined on"),
    },
}
KINDS = {"workdir": str, "start": str, "steps": int, "seed": int, "tellers": int, "test_renders": int}
DEFAULTS = {"workdir": "", "start": "", "steps": 6000, "seed": 0, "tellers": 0, "test_renders": 2000}


def main(argv: Sequence[str]) -> int:
    """From the command line to a probe; returns the exit code."""
    options = cli.options(argv, __doc__, FLAGS, KINDS, DEFAULTS, {})
    if options is None:
        return cli.DONE
    if not options["workdir"]:
        raise UserError("where should the run be kept? write --workdir=FOLDER")
    for name in ("steps", "test_renders"):
        if options[name] < 1:
            raise UserError(f"{name}={options[name]}: write 1 or more")
    if not 0 <= options["seed"] < 2**16:
        raise UserError(f"seed={options['seed']}: write a number from 0 to 2^16 - 1")
    if options["tellers"] < 0:
        raise UserError(f"tellers={options['tellers']}: write 0 or more")

    try:  # JAX comes with these: --help should be instant
        from engine.evaluate import reader, reader_training
        from engine.train import loop  # noqa: F401  # what training needs
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[train]'") from None

    workdir = pathlib.Path(options["workdir"]).expanduser()
    start = pathlib.Path(options["start"]).expanduser() if options["start"] else None
    stage = reader_training.stage(options["steps"], further=start is not None)
    try:
        params = train(workdir, stage, start, options["tellers"], options["seed"])
        if params is None:
            return cli.STOPPED
        reader.save(params, workdir / "probe.safetensors")
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error.strerror or error}") from None
    shares = reader_training.accuracy(reader.load(workdir / "probe.safetensors"), options["test_renders"])
    cli.say("  ".join(f"{question} {share:.2%}" for question, share in shares.items()))
    return cli.DONE


def train(
    workdir: pathlib.Path,
    stage: StageConfig,
    start: pathlib.Path | None = None,
    tellers: int = 0,
    seed: int = 0,
):
    """Weights of a probe, averaged over the last steps; None where a signal stopped the run.

    Args:
      start: the file of a probe that has learned before; other scenes than its first ones follow.
      tellers: processes that tell the scenes, see `engine.world.tellers.drawn`.
      seed: of fresh weights, of the softness of the renders and of the scenes.
    """
    import jax

    from engine.evaluate import reader, reader_training
    from engine.train import loop, optim

    fresh = start is None
    scenes = (reader_training.SEED if fresh else reader_training.FURTHER_SEED) + seed * 2**40
    return loop.fit(
        "probe",
        reader_training.loss,
        reader.init(jax.random.key(seed)) if fresh else reader.load(start),
        None,
        optim.optimizer(stage.optim, stage.steps),
        stage,
        seed=seed,
        batch_at=reader_training.batches(stage.batch_size, scenes, tellers),
        workdir=workdir,
    )


if __name__ == "__main__":
    cli.main(main)
