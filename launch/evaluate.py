"""Measures how well a model of the drawn world follows its prompts.

  python -m launch.evaluate
  python -m launch.evaluate --model runs/scenes_small/model --num_prompts 100

Draws prompts whose every fact can be checked, one thing and two, and lets a probe read the things, the
background and the arrangement from the pictures. The probe is a small net that is trained on renders when it
is first needed (ten minutes of one core) and kept in the user's cache folder; the line "renders" says how
often it is right about pictures whose content is known.

Of a model of the grown world (configs/scenes.py) more is asked: colours, counts, relations and styles, of
combinations that it was trained on and of those that were held out. How like renders the pictures look, the
best and the worst of them, and the nearest pictures of the training are written beside the table:

  python -m launch.evaluate --world grown --model runs/scenes/model --probe runs/probe/probe.safetensors

FID and CLIP score of any model's pictures, or of pictures that are there, need none of that:

  python -m launch.evaluate --model FOLDER --prompts_file captions.txt --clip CLIP_FOLDER \\
    --inception weights.safetensors --reference PHOTOGRAPHS --out results
  python -m launch.evaluate --pictures JOB_FOLDER --clip CLIP_FOLDER
  python -m launch.evaluate --inception weights.safetensors --reference PHOTOGRAPHS --save_reference stats.npz

The shares of right pictures, or the figures, go to stdout. Exit code: 0 measured; 2 a mistake, explained in
one line; 130 stopped with Ctrl-C.
"""

from collections.abc import Mapping, Sequence

from engine.config import GenerateConfig, nearest
from engine.errors import UserError
from launch import cli, quality

FLAGS: cli.Groups = {
    "What to draw": {
        "model": ("FOLDER", "in the layout of PyTorch diffusers, or the one in the package"),
        "num_prompts": ("N", "prompts of each kind"),
        "world": ("WORLD", "that the model was trained on: small (configs/scenes_small.py) or grown"),
        "probe": ("FILE", "that reads pictures of the grown world, made by launch.probe"),
        "train_seed": ("N", "of the scenes that the grown world's model has seen: config.seed + 1"),
        "seed": ("N", "of the prompts and of the pictures"),
    },
    "How": {
        "sampler": ("NAME", "without it the one that the model names"),
        "steps": ("N", "more is finer and slower"),
        "guidance_scale": ("G", "how strictly to follow the prompt; 1 is no guidance"),
        "batch_size": ("N", "pictures that each device draws at once"),
    },
}
KINDS = {
    "model": str,
    "num_prompts": int,
    "world": str,
    "probe": str,
    "train_seed": int,
    "seed": int,
    "sampler": str,
    "steps": int,
    "guidance_scale": float,
    "batch_size": int,
}
WORLDS = ("small", "grown")
GENERATE = GenerateConfig()
DEFAULTS = {
    "model": GENERATE.model,
    "num_prompts": 500,
    "world": "small",
    "probe": "",
    "train_seed": 1,
    "seed": 0,
    "sampler": GENERATE.sampler,
    "steps": GENERATE.steps,
    "guidance_scale": GENERATE.guidance_scale,
    "batch_size": 16,
}


def main(argv: Sequence[str]) -> int:
    """From the command line to shares; returns the exit code."""
    groups, kinds = {**FLAGS, **quality.FLAGS}, {**KINDS, **quality.KINDS}
    options = cli.options(argv, __doc__, groups, kinds, DEFAULTS, {})
    if options is None:
        return cli.DONE
    if quality.is_asked_for(options):
        return quality.main(argv, KINDS)
    if options["world"] not in WORLDS:
        known = nearest(options["world"], WORLDS)
        raise UserError(f"world={options['world']!r} is unknown{known}; write {' or '.join(WORLDS)}")
    if options["num_prompts"] < 1:
        raise UserError(f"num_prompts={options['num_prompts']}: write 1 or more")
    if not 0 <= options["seed"] < 2**32:
        raise UserError(f"seed={options['seed']}: write a number from 0 to 2^32 - 1")

    if options["world"] == "grown" and not options["probe"]:
        raise UserError("which probe reads the pictures? write --probe FILE, made by launch.probe")

    try:  # JAX comes with these: --help should be instant
        from engine import pipeline
        from engine.evaluate import following, probe_training
        from launch import composing
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[train]'") from None

    if options["world"] == "grown":
        return composing.run({"out": quality.OUT, **options})
    pipe = pipeline.load(None if options["model"] == GENERATE.model else options["model"])
    how = {name: options[name] for name in ("sampler", "steps", "guidance_scale", "batch_size")}
    pipe.settings(**how)  # a wrong one is said before the minutes that the probe may take
    probe = probe_training.trained()
    say_row("renders", probe_training.accuracy(probe))
    for kind in following.KINDS:
        say_row(kind, following.evaluate(pipe, probe, kind, options["num_prompts"], options["seed"], **how))
    return cli.DONE


def say_row(name: str, shares: Mapping[str, float]) -> None:
    cli.say("  ".join([f"{name:8}", *(f"{fact} {share:.1%}" for fact, share in shares.items())]))


if __name__ == "__main__":
    cli.main(main)
