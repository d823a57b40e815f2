"""Encodes pictures and captions once, so that training a U-Net needs neither autoencoder nor text encoder.

  python -m launch.cache --model stable-diffusion-v1-5 --data pictures --out runs/latents
  python -m launch.cache --model MODEL --data shards --buckets 9 --batch_size 16 --out runs/latents

Reads what training reads: a folder of pictures with captions, or shards (.tar, .arrayrecord, .parquet). The
same command goes on after a stop. What cannot be used is listed in OUT/skipped.jsonl.

The path of the folder goes to stdout. Exit code: 0 written; 2 a mistake, explained in one line; 130 stopped
with Ctrl-C.
"""

import pathlib
from collections.abc import Sequence

from engine.config import DRAWN, DataConfig
from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What to encode": {
        "model": ("FOLDER", "in the layout of PyTorch diffusers"),
        "clip_skip": ("N", "layers of its text encoders that are left out at their end, as in training"),
        "data": ("PATH", "a folder of pictures with captions, a shard, or a folder of shards"),
        "kind": ("KIND", "files, webdataset, arrayrecord or parquet, where the path holds several"),
        "caption_field": ("NAME", "in JSON and Parquet; without it caption, text or prompt"),
        "min_size": ("N", "pixels of the shorter side; smaller pictures are skipped"),
    },
    "In what shape": {
        "size": ("N", "pixels; without it what the model was trained for"),
        "buckets": ("N", "shapes of about that area; 1: squares alone"),
        "max_aspect": ("A", "of the widest and the tallest shape"),
        "multiple": ("N", "pixels, which divides the sides of all shapes"),
    },
    "How": {
        "batch_size": ("N", "pictures at once"),
        "workers": ("N", "threads that decode pictures"),
        "out": ("DIR", "to write into"),
    },
}
SETTINGS = ("kind", "caption_field", "min_size", "size", "buckets", "max_aspect", "multiple", "workers")
NEEDED = {"model": "FOLDER", "data": "PATH", "out": "DIR"}
DATA = DataConfig()
DEFAULTS = {name: getattr(DATA, name) for name in SETTINGS} | {"batch_size": 8, "clip_skip": 0}
KINDS = {name: type(value) for name, value in DEFAULTS.items()} | dict.fromkeys(NEEDED, str)


def main(argv: Sequence[str]) -> int:
    """From the command line to a folder; returns the exit code."""
    options = cli.options(argv, __doc__, FLAGS, KINDS, DEFAULTS, NEEDED, "data")
    if options is None:
        return cli.DONE
    if options["batch_size"] < 1:
        raise UserError(f"batch_size={options['batch_size']}: write 1 or more")
    if options["kind"] == DRAWN:
        raise UserError(f"--kind={DRAWN} has no pictures to read: leave it out")
    config = DataConfig(paths=(options["data"],), **{name: options[name] for name in SETTINGS})
    with cli.data_by_flags(SETTINGS):
        config.validate()
        out = pathlib.Path(options["out"]).expanduser()
        encode(config, options["model"], out, options["batch_size"], options["clip_skip"])
    cli.say(options["out"])
    return cli.DONE


def encode(
    config: DataConfig, model_folder: str, out: pathlib.Path, batch_size: int, clip_skip: int = 0
) -> None:
    """Writes the cache of a config's pictures; UserError for all that can be wrong."""
    try:  # JAX comes with these: --help should be instant
        from engine.train import latents
        from engine.train.sources import PictureBatches, Skipped
        from engine.weights.folder import load_trainable
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[train]'") from None
    model = load_trainable(model_folder, clip_skip)
    size = config.size or min(model.default_size)
    try:
        pictures = PictureBatches(config, 1, size, Skipped(out / "skipped.jsonl"))
        cli.tell(pictures.summary())
        with cli.stops_put_off():
            latents.write_cache(model, pictures, out, batch_size, report)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None


def report(done: int, whole: int) -> None:
    cli.tell(f"{done} of {whole} pictures")
    cli.stop_if_asked()


if __name__ == "__main__":
    cli.main(main)
