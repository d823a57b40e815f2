"""How well a model of the drawn world follows its prompts.

python -m launch.evaluate --model runs/scenes_small/model

Draws prompts whose every fact can be checked, and lets a probe (trained the first time, which takes some
minutes, and kept in the user's cache folder) read things, background and arrangement from the pictures.
"""

import sys

from absl import app, flags

from engine.types import UserError

_MODEL = flags.DEFINE_string("model", None, "A model folder; without it, the model in the package.")
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 500, "Prompts of each kind.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and pictures.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 30, "Sampling steps.")
_SAMPLER = flags.DEFINE_string("sampler", None, "Sampler; without it, the one that the model names.")
_GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 5.0, "Classifier-free guidance; 1 is none.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures a device draws at once.", lower_bound=1)


def main(_: list[str]) -> None:
    from engine import pipeline  # after the flags: --help should be quick
    from engine.evaluate import following, probe_training

    settings = {
        "steps": _STEPS.value,
        "sampler": _SAMPLER.value,
        "guidance_scale": _GUIDANCE_SCALE.value,
    }
    try:
        pipe = pipeline.load(_MODEL.value)
        pipe.settings(**settings)  # a wrong one is said before the probe's minutes
        probe = probe_training.trained()
        _print_row("renders", probe_training.accuracy(probe))
        for kind in following.KINDS:
            shares = following.evaluate(
                pipe, probe, kind, _NUM_PROMPTS.value, _SEED.value, _BATCH_SIZE.value, **settings
            )
            _print_row(kind, shares)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _print_row(name: str, shares: dict[str, float]) -> None:
    print(f"{name:8}", *(f"{fact} {share:.1%}" for fact, share in shares.items()), sep="  ", flush=True)


if __name__ == "__main__":
    app.run(main)
