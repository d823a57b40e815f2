"""Draws scenes of the world that the shipped model learns, as a folder of pictures with captions.

  python -m launch.scenes --num_images 20 --style chalk --out chalk

Beside the pictures, FOLDER/metadata.jsonl says what each shows ({"file_name": ..., "text": ...}), as data
sets of pictures do. With --style all are in that style, which ends every caption. "chalk", light lines on a
dark board, is one that no model of this world is trained on: something for a LoRA to learn.

The path of the folder goes to stdout. Exit code: 0 written; 2 a mistake, explained in one line; 130 stopped
with Ctrl-C.
"""

import dataclasses
import json
import os
from collections.abc import Sequence

from engine.config import nearest
from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What to draw": {
        "num_images": ("N", "pictures"),
        "style": (
            "STYLE",
            "watercolour, pencil sketch, pixel art, neon, photo or chalk; without it, all sorts",
        ),
        "size": ("PIXELS", "of each side, a multiple of 32"),
        "easy": ("SHARE", "of scenes of one big thing, from 0 to 1"),
        "seed": ("N", "the same seed draws the same pictures"),
    },
    "Where": {"out": ("FOLDER", "made if it is not there")},
}
DEFAULTS = {"num_images": 20, "style": "", "size": 128, "easy": 0.0, "seed": 0}
MOST = 100_000
CHALK = "chalk"


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
    ranges = {"num_images": (1, MOST), "size": (32, 1024), "easy": (0, 1), "seed": (0, 2**31 - 1)}
    for name, (low, high) in ranges.items():
        if not low <= options[name] <= high:
            raise UserError(f"{name}={options[name]} is out of range; write {low} to {high}")


def write(options: dict) -> None:
    """Writes pictures and captions."""
    from engine import finish, world  # only now: --help should be instant
    from engine.world.scene import STYLES

    style = options["style"]
    if style and style not in (styles := (*STYLES[1:], CHALK)):  # the first is plain
        raise UserError(f"style={style!r} is unknown{nearest(style, styles)}; write {', '.join(styles)}")
    folder = finish.prepare_folder(os.path.expanduser(options["out"]))
    lines = []
    for index in range(options["num_images"]):
        cli.stop_if_asked()
        caption, scene, rng = world.tell(options["seed"], index, options["easy"])
        if style:
            plain = dataclasses.replace(scene, style=STYLES[0])
            scene = plain if style == CHALK else dataclasses.replace(scene, style=style)
            caption = f"{world.caption(plain, rng)}, {style}"
        (image,), _ = world.draw([scene], [rng], options["size"])
        if style == CHALK:
            image = in_chalk(image)
        name = finish.picture_name(index, caption)
        finish.write_png(folder / name, image, {"prompt": caption, "scenes": options["seed"], "index": index})
        lines.append(json.dumps({"file_name": name, "text": caption}))
    finish.write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def in_chalk(image):
    """uint8 (S, S, 3): the edges of a picture as light lines on a dark green board."""
    import numpy as np
    from PIL import Image, ImageFilter, ImageOps

    edges = Image.fromarray(image).convert("L").filter(ImageFilter.FIND_EDGES)
    inside = ImageOps.expand(ImageOps.crop(edges, 2), 2)  # the filter copies the border
    lines = inside.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(0.6))
    return np.asarray(ImageOps.colorize(ImageOps.autocontrast(lines), "#17352b", "#f4f1e4"))


if __name__ == "__main__":
    cli.main(main)
