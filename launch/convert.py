"""Makes a folder of a single file of Stable Diffusion 1, 2 or XL, or a single file of a folder.

  python -m launch.convert v1-5-pruned-emaonly.safetensors sd15 --tokenizer FOLDER
  python -m launch.convert v2-base.safetensors sd2-base --tokenizer FOLDER --prediction_type epsilon
  python -m launch.convert sd_xl_base_1.0.safetensors sdxl --tokenizer FOLDER
  python -m launch.convert sd15 sd15.safetensors --dtype float16

A single file has all weights in one, under the names that they were first published with. It lacks a
tokenizer: the tokenizer/ of any folder of the same Stable Diffusion will do. XL has two, which differ in
what fills a prompt up: give the folder with tokenizer/ and tokenizer_2/. Of one tokenizer alone the second is
made, which fills up with "!" (id 0). A LoRA is given to launch.generate as it is. .ckpt files can run code,
and are never opened: the message says what makes safetensors of one.

The path of what was written goes to stdout, and to stderr what was assumed or not read. Exit code: 0 written;
2 a mistake, explained in one line; 130 stopped with Ctrl-C. Except for 0, nothing is written.
"""

import os
import pathlib
from collections.abc import Sequence

from engine.config import nearest
from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What to write": {
        "dtype": ("TYPE", "on disk: float32, float16 or bfloat16; without it as it was"),
        "overwrite": ("", "replace the folder of a model, or the file, that is there"),
    },
    "Of a file": {
        "tokenizer": (
            "FOLDER",
            "with vocab.json and merges.txt, or the folder of a model that has it; for XL the one\n"
            'with tokenizer/ and tokenizer_2/, or one tokenizer: the second then fills up with "!"',
        ),
        "prediction_type": (
            "TYPE",
            "epsilon or v_prediction, which no file says; without it that of Stable Diffusion 1\n"
            "and XL (epsilon) or 2 (v_prediction; 2-base needs epsilon here)",
        ),
    },
}
KINDS = {"dtype": str, "overwrite": bool, "tokenizer": str, "prediction_type": str}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SINGLE = ".safetensors"


def main(argv: Sequence[str]) -> int:
    """From the command line to a folder or a file; returns the exit code."""
    advice = "write what to read and what to write: python -m launch.convert SRC DST"
    parsed = cli.source_and_target(argv, __doc__, FLAGS, KINDS, advice)
    if parsed is None:
        return cli.DONE
    source, target, given = parsed
    try:
        check(source, target, given)
        from engine.weights import single_file, single_file_written  # JAX comes with them

        if source.is_dir():
            told = single_file_written.to_file(source, target, **given)
        else:
            told = single_file.to_folder(source, target, **given)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    for line in told:
        cli.tell(f"note: {line}")
    cli.say(str(target))
    return cli.DONE


def check(source: pathlib.Path, target: pathlib.Path, given: dict) -> None:
    """UserError where paths and flags do not go together."""
    predicted = given.get("prediction_type")
    if predicted is not None and predicted not in PREDICTIONS:
        near = nearest(predicted, PREDICTIONS)
        raise UserError(f"--prediction_type={predicted} is unknown{near}; write {' or '.join(PREDICTIONS)}")
    if not os.path.exists(source):  # unlike Path's own, silent about names that are too long
        raise UserError(f"no {source}: write the path of a {SINGLE} file or of a model's folder")
    exists = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if exists and not given.get("overwrite"):
        raise UserError(f"{target} already exists: choose another name, or write --overwrite")
    if source.is_dir():
        for flag in [flag for flag in ("tokenizer", "prediction_type") if flag in given]:
            raise UserError(f"--{flag} is for a file that becomes a folder; {source} is a folder")
        if target.suffix != SINGLE:
            raise UserError(f"{source} is a folder, and becomes a single file: write {target}{SINGLE}")
    elif target.suffix == SINGLE:
        raise UserError(f"{source} is a file, and becomes a folder: write {target.with_suffix('')}")


if __name__ == "__main__":
    cli.main(main)
