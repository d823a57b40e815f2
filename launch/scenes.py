"""Draws scenes of the world that the shipped model learned, as a folder of pictures with captions.

  python -m launch.scenes --num_images 20 --style "pencil sketch" --out sketches

Beside the pictures, FOLDER/metadata.jsonl says what each shows ({"file_name": ..., "text": ...}), as data
sets of pictures do. The path of the folder goes to stdout. Exit code: 0 written; 2 a mistake, explained in
one line; 130 stopped with Ctrl-C.
"""

import json
import os
from collections.abc import Sequence

from engine.config import nearest
from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What to draw": {
        "num_images": ("N", "pictures"),
        "style": ("STYLE", "pencil sketch, neon, pixel art or watercolour; without it as emoji are"),
        "size": ("PIXELS", "of each side"),
        "easy": ("SHARE", "of scenes of one big thing, from 0 to 1"),
        "seed": ("N", "the same seed draws the same pictures"),
    },
    "Where": {"out": ("FOLDER", "made if it is not there")},
}
DEFAULTS = {"num_images": 20, "style": "", "size": 64, "easy": 0.0, "seed": 0}
MOST = 100_000


def main(argv: Sequence[str]) -> int:
    """From the command line to a folder; returns the exit code."""
    kinds = {name: type(value) for name, value in DEFAULTS.items()} | {"out": str}
    options = cli.options(argv, __doc__, FLAGS, kinds, DEFAULTS, {"out": "FOLDER"}, "out")
    if options is None:
        return cli.DONE
    check(options)
    with cli.stops_put_off():
        write(options)
    cli.say(str(options["out"]))
    return cli.DONE


def check(options: dict) -> None:
    """Raises UserError for an option that is out of range."""
    ranges = {"num_images": (1, MOST), "size": (16, 1024), "easy": (0, 1), "seed": (0, 2**31 - 1)}
    for name, (low, high) in ranges.items():
        if not low <= options[name] <= high:
            raise UserError(f"{name}={options[name]} is out of range; write {low} to {high}")


def write(options: dict) -> None:
    """Writes pictures and captions."""
    from engine import finish, scenes  # only now: --help should be instant

    style = options["style"]
    if style and style not in scenes.STYLES:
        raise UserError(f"style={style!r} is unknown{nearest(style, scenes.STYLES)}")
    folder = finish.prepare_folder(os.path.expanduser(options["out"]))
    lines = []
    for index in range(options["num_images"]):
        cli.stop_if_asked()
        image, caption, _ = scenes.example(options["seed"], index, options["size"], options["easy"])
        if style:
            image, caption = scenes.restyle(image, style), f"{caption}, {style}"
        name = finish.picture_name(index, caption)
        finish.write_png(folder / name, image, {"prompt": caption, "scenes": options["seed"], "index": index})
        lines.append(json.dumps({"file_name": name, "text": caption}))
    finish.write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.main(main)
