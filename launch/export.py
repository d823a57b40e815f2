"""Writes the model of a training, finished or not: in the diffusers layout, or a LoRA's or a word's file.

  python -m launch.export --workdir runs/mine --out mine
  python -m launch.export --workdir runs/mine --out mine-raw --which params
  python -m launch.export --workdir runs/mine --out mine-wide --sigma_rel 0.12

The path goes to stdout. Exit code: 0 written; 2 a mistake, explained in one line; 130 stopped with Ctrl-C.
"""

import pathlib
from collections.abc import Sequence

from absl import logging

from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "Of what": {
        "workdir": ("DIR", "of the training"),
        "which": ("NAME", "params (raw), or an average such as ema_0.999; without it what the run ends with"),
        "sigma_rel": ("WIDTH", "the power-function average of this width, from a run that kept snapshots"),
        "step": ("N", "of the checkpoint or snapshot; without it the newest"),
    },
    "Where": {"out": ("FOLDER", "which must not exist")},
}
KINDS = {"workdir": str, "out": str, "which": str, "sigma_rel": float, "step": int}


def main(argv: Sequence[str]) -> int:
    """From the command line to a folder; returns the exit code."""
    given = cli.options(argv, __doc__, FLAGS, KINDS, {}, {"workdir": "DIR", "out": "FOLDER"}, "workdir")
    if given is None:
        return cli.DONE
    workdir, out = (pathlib.Path(given.pop(name)).expanduser() for name in ("workdir", "out"))
    from engine.train.export import export  # JAX comes with it: --help should be instant

    logging.set_verbosity(logging.ERROR)  # Orbax tells much
    try:
        cli.say(str(export(workdir, out, **given)))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return cli.DONE


if __name__ == "__main__":
    cli.main(main)
