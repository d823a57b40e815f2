"""Measures how well a model of the drawn world follows its prompts.

  python -m launch.evaluate
  python -m launch.evaluate --model runs/scenes/model --num_prompts 500 --out results

Draws prompts whose every fact can be checked: single things, colours, counts, relations and styles, of
combinations that the model was trained on and of those that were held out. A probe, a small net that was
trained on renders alone (launch.probe), reads from the pictures what they show, and from renders of the same
scenes: what it misses there it would miss in a perfect model's pictures, too. Then comes how like renders the
pictures look. OUT gets all figures (evaluation.json), the best and the worst pictures, and the nearest
pictures of the training beside some of the drawn ones.

FID and CLIP score of any model's pictures, or of pictures that are there, need none of that:

  python -m launch.evaluate --model FOLDER --prompts_file captions.txt --clip CLIP_FOLDER \\
    --inception weights.safetensors --reference PHOTOGRAPHS --out results
  python -m launch.evaluate --pictures JOB_FOLDER --clip CLIP_FOLDER
  python -m launch.evaluate --inception weights.safetensors --reference PHOTOGRAPHS --save_reference stats.npz

The shares of right pictures, or the figures, go to stdout. Exit code: 0 measured; 2 a mistake, explained in
one line; 130 stopped with Ctrl-C.
"""

from collections.abc import Sequence

from engine.config import GenerateConfig
from engine.errors import UserError
from launch import cli, quality

FLAGS: cli.Groups = {
    "What to draw": {
        "model": ("FOLDER", "in the layout of PyTorch diffusers, or the one in the package"),
        "lora": ("FILE[=SCALE]", "as in launch.generate; several with commas between them"),
        "num_prompts": ("N", "prompts of each of the nine kinds"),
        "probe": ("FILE", "that reads the pictures, made by launch.probe, or the one in the package"),
        "train_seed": ("N", "of the scenes that the model has seen: config.seed + 1"),
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
    "lora": str,
    "num_prompts": int,
    "probe": str,
    "train_seed": int,
    "seed": int,
    "sampler": str,
    "steps": int,
    "guidance_scale": float,
    "batch_size": int,
}
GENERATE = GenerateConfig()
DEFAULTS = {
    "model": GENERATE.model,
    "lora": GENERATE.lora,
    "num_prompts": 100,
    "probe": GENERATE.model,
    "train_seed": 1,
    "seed": 0,
    "sampler": GENERATE.sampler,
    "steps": GENERATE.steps,
    "guidance_scale": GENERATE.guidance_scale,
    "batch_size": 16,
}


def main(argv: Sequence[str]) -> int:
    """From the command line to figures; returns the exit code."""
    groups, kinds = {**FLAGS, **quality.FLAGS}, {**KINDS, **quality.KINDS}
    options = cli.options(argv, __doc__, groups, kinds, DEFAULTS, {})
    if options is None:
        return cli.DONE
    if quality.is_asked_for(options):
        return quality.main(argv, KINDS)
    if options["num_prompts"] < 1:
        raise UserError(f"num_prompts={options['num_prompts']}: write 1 or more")
    for name in ("seed", "train_seed"):
        if not 0 <= options[name] < 2**32:
            raise UserError(f"{name}={options[name]}: write a number from 0 to 2^32 - 1")

    try:  # JAX comes with these: --help should be instant
        from launch import composing
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[train]'") from None

    return composing.run({"out": quality.OUT, **options})


if __name__ == "__main__":
    cli.main(main)
