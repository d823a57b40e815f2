"""Writes a model folder with random weights, to benchmark an architecture without a download.

python -m launch.random_model --architecture sd15 --out /tmp/sd15
"""

import sys

from absl import app, flags

from engine.types import UserError

_ARCHITECTURE = flags.DEFINE_string("architecture", "sd15", "Which: sd15 or sd21.")
_OUT = flags.DEFINE_string("out", None, "The folder to write; it must not exist.")
_DTYPE = flags.DEFINE_string("dtype", "float16", "On disk: float32, float16 or bfloat16.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed writes the same bytes.", lower_bound=0)


def main(_: list[str]) -> None:
    from engine.weights.random_folder import random_folder  # after the flags: --help should be quick

    try:
        random_folder(_OUT.value, _ARCHITECTURE.value, _DTYPE.value, _SEED.value)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"model: {_OUT.value}")


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    app.run(main)
