"""Makes one model of several, or of a model and LoRAs: a folder that any program draws with.

  python -m launch.merge sd15 inked --lora ink.safetensors=0.8
  python -m launch.merge sd15 between --toward dreamy=0.3
  python -m launch.merge sd15-inpainting dreamy-inpainting --plus dreamy --minus sd15

MODEL and all others are folders in the diffusers layout; launch.convert makes one of a single file, and a
single file of what this writes. Weights are added in float32, tensor by tensor, and written in the type that
MODEL has them in. Tokenizer, scheduler and autoencoder are MODEL's.

The path of what was written goes to stdout. Exit code: 0 written; 2 a mistake, explained in one line; 130
stopped with Ctrl-C. Except for 0, nothing is written.
"""

from collections.abc import Sequence

from engine.config import scaled
from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What to add": {
        "toward": (
            "FOLDER[=SHARE]",
            "another model, of which so much takes the place of MODEL's own, 0.5 unless told; several\n"
            "with commas between them. Beyond 1 goes further than it, below 0 away from it",
        ),
        "plus": (
            "FOLDER[=WEIGHT]",
            "with --minus: the difference of two others, such as a model and its base, is added to\n"
            "MODEL, so that an inpainting model, which sees more, learns what the other knows",
        ),
        "minus": ("FOLDER[=WEIGHT]", "of --plus"),
        "lora": ("FILE[=SCALE]", "a LoRA, LyCORIS or DoRA; several with commas between them"),
        "parts": (
            "NAMES",
            "which networks are made of several, with commas between them: unet, text_encoder,\n"
            "text_encoder_2, vae; without it all but the last. A LoRA changes those that it is for",
        ),
    },
    "What to write": {
        "dtype": ("TYPE", "on disk: float32, float16 or bfloat16; without it as it was"),
        "overwrite": ("", "replace the folder of a model that is there"),
    },
}
KINDS = dict.fromkeys(("toward", "plus", "minus", "lora", "parts", "dtype"), str) | {"overwrite": bool}
HALF = 0.5


def main(argv: Sequence[str]) -> int:
    """From the command line to a folder; returns the exit code."""
    advice = "write what to begin with and what to write: python -m launch.merge MODEL NEW"
    parsed = cli.source_and_target(argv, __doc__, FLAGS, KINDS, advice)
    if parsed is None:
        return cli.DONE
    source, target, given = parsed
    if target.suffix == ".safetensors":
        raise UserError(f"{target}: what is written is a folder; launch.convert makes a single file of it")
    toward = scaled("toward", given.pop("toward", ""), "FOLDER", "a=0.3,b=0.2", HALF)
    plus, minus = (scaled(name, given.pop(name, ""), "FOLDER", "a=0.8,b") for name in ("plus", "minus"))
    loras = scaled("lora", given.pop("lora", ""), "FILE", "a.safetensors=0.8,b.safetensors")
    parts = [part.strip() for part in given.pop("parts", "").split(",") if part.strip()]
    from engine.weights import mixing  # JAX comes with it: --help should be instant

    mixture = mixing.Mixture(toward, plus, minus, loras, parts)
    try:
        mixing.write_mixed(source, target, mixture, **given)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    cli.say(str(target))
    return cli.DONE


if __name__ == "__main__":
    cli.main(main)
