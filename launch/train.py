"""Trains a text-to-image model; a stopped run goes on with the same command."""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from engine.types import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=False)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the exported model.")


def main(_: list[str]) -> None:
    from engine.train import stages  # after the flags: --help should be quick

    logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell much

    try:
        folder = stages.train(_CONFIG.value, pathlib.Path(_WORKDIR.value))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if folder is not None:
        print(f"model: {folder}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
