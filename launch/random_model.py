"""Writes a model folder with random weights, to benchmark an architecture without a download.

  python -m launch.random_model --architecture sd15 --out /tmp/sd15

The path of the folder goes to stdout. Exit code: 0 written; 2 a mistake, explained in one line; 130 stopped
with Ctrl-C. Except for 0, there is no folder.
"""

from collections.abc import Sequence

from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What to write": {
        "architecture": ("NAME", "sd15 (Stable Diffusion 1.5), sd21 (2.1), sdxl, sdxl-refiner or tiny"),
        "dtype": ("TYPE", "on disk: float32, float16 or bfloat16"),
        "seed": ("N", "the same seed writes the same bytes"),
        "out": ("FOLDER", "which must not exist"),
    },
}
DEFAULTS = {"architecture": "sd15", "dtype": "float16", "seed": 0}


def main(argv: Sequence[str]) -> int:
    """From the command line to a folder; returns the exit code."""
    kinds = {name: type(value) for name, value in DEFAULTS.items()} | {"out": str}
    options = cli.options(argv, __doc__, FLAGS, kinds, DEFAULTS, {"out": "FOLDER"}, "out")
    if options is None:
        return cli.DONE
    from engine.weights.random_folder import random_folder  # JAX comes with it: --help should be instant

    try:
        random_folder(options["out"], options["architecture"], options["dtype"], options["seed"])
    except OSError as error:
        raise UserError(f"{options['out']} cannot be written: {error.strerror or error}") from None
    cli.say(str(options["out"]))
    return cli.DONE


if __name__ == "__main__":
    cli.main(main)
