"""Draws what sentences ask for, each into a PNG that remembers how it was made.

  python -m launch.generate PROMPT... [flags]

  python -m launch.generate "a fox on a skateboard at sunset"
  python -m launch.generate "a cat" "a dog" --num_images 4 --seed 7
  python -m launch.generate "a red car at night" --frames 8 --animate
  python -m launch.generate --like out/00000-a-cat.png --steps 100

Pictures are named INDEX-PROMPT.png. The index counts from 0 in every run; seed and index together are the
noise that a picture starts from, so the same command with the same seed draws the same pictures again.
Where another picture has the name already, -2, -3, ... is added; nothing is lost.

Paths of pictures go to stdout, all else to stderr. Exit code: 0 all drawn; 1 some met a NaN and were left
out; 2 a mistake, explained in one line; 130 stopped with Ctrl-C (what was drawn stays).
"""

import typing
from collections.abc import Sequence
from typing import Any

from engine.config import GenerateConfig
from launch import cli

FLAGS: cli.Groups = {
    "What to draw": {
        "negative_prompt": ("TEXT", "what to steer away from"),
        "num_images": ("N", "pictures of each prompt"),
        "seed": ("N", "0 to 2^64 - 1; without it a fresh one is drawn and printed"),
        "first_index": ("N", "index of the first picture"),
        "like": ("PICTURE", "draw this PNG again: its settings stand in for the defaults below and above"),
    },
    "How": {
        "model": ("FOLDER", "in the layout of PyTorch diffusers, or the one in the package"),
        "sampler": (
            "NAME",
            "ddim, ddpm, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde or pndm;\n"
            "without it the one that the model names",
        ),
        "steps": ("N", "more is finer and slower"),
        "guidance_scale": (
            "G",
            "how strictly to follow the prompt; 1 is no guidance, and twice as fast",
        ),
        "height": ("PIXELS", "without it the size that the model was trained for"),
        "width": ("PIXELS", "likewise"),
    },
    "On which devices": {
        "parallel": ("MODE", "over all local devices: shard_map, jit or pmap"),
        "dtype": ("TYPE", "of the model: float32 or bfloat16"),
        "batch_size": (
            "N",
            "pictures that each device draws at once; without it up to 16. The last batch is\n"
            "filled up: with the same N, pictures are equal bit for bit on any number of devices",
        ),
    },
    "What to write": {
        "out": ("FOLDER", "made if it is not there"),
        "upscale": ("N", "enlarge pictures to N times their size"),
        "frames": ("N", "beside each picture a strip of N stages from static to picture"),
        "animate": ("", "beside each picture an animated WebP of its stages"),
    },
}


def main(argv: Sequence[str]) -> int:
    """From the command line to pictures; returns the exit code."""
    command = read_command(argv)
    if command is None:
        print(cli.help_text(__doc__ or "", FLAGS, vars(GenerateConfig())))
        return cli.DONE
    with cli.ctrl_c_put_off():
        from launch import drawing  # JAX comes with it: help, and mistakes in flags, should be instant

        return drawing.run(*command)


def read_command(argv: Sequence[str]) -> tuple[dict[str, Any], str | None] | None:
    """The options of GenerateConfig that were given, and --like; None where help is asked for."""
    kinds = typing.get_type_hints(GenerateConfig)
    del kinds["prompts"]
    parsed = cli.parse(argv, kinds | {"like": str})
    if parsed is None:
        return None
    prompts, given = parsed
    if prompts:
        given["prompts"] = tuple(prompts)
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        cli.tell(f"warning: {len(prompts)} prompts of one word each; put a sentence in quotes")
    like = given.pop("like", None)
    if like is None:
        GenerateConfig(**given).validate()
    return given, like


def run(argv: Sequence[str]) -> int:
    """`python -m launch.generate` inside another program: prints, and returns the exit code."""
    return cli.exit_code(main, argv)


if __name__ == "__main__":
    cli.main(main)
