"""How many of the stated facts a model's pictures show, as the probe reads them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from engine import scenes
from engine.evaluate.probe import Answers, read, truth
from engine.pipeline import Pipeline
from engine.types import Params, UserError

KINDS = {"single": 1, "two": 2}  # things in the scene


def prompts_for_evaluation(kind: str, n: int, seed: int = 0) -> list[tuple[str, scenes.Scene]]:
    """`n` prompts with their scenes; everything that a prompt states can be checked in the picture.

    The scenes are those of the training's kind, drawn from the numbers 2**33 + seed, which no training
    uses: a prompt may say what some caption said, as "a fox on a skateboard at sunset" would.

    Args:
      kind: 'single' or 'two' things.
    """
    if kind not in KINDS:
        raise UserError(f"kind of prompts {kind!r}: write {' or '.join(KINDS)}")
    rng = np.random.Generator(np.random.Philox(key=[2**33 + seed, KINDS[kind]]))
    prompts = []
    while len(prompts) < n:
        scene = scenes.sample_scene(rng)
        if len(scene.things) == KINDS[kind]:
            prompts.append((scenes.caption(scene, rng, exact=True), scene))
    return prompts


def score(answers: Answers, drawn: Sequence[scenes.Scene]) -> dict[str, float]:
    """Shares, 0..1, of pictures that show what was asked.

    Returns:
      things: exactly the right ones, whichever stands where.
      background, arrangement: right. An arrangement of two things is right if it is the right one and the
        things, where both are right, have not changed places.
      all: every fact is right.
    """
    right = truth(drawn)
    if len(right.first) != len(answers.first):
        raise ValueError(f"{len(answers.first)} answers for {len(drawn)} scenes")
    asked, seen = (np.sort(np.stack([a.first, a.second]), axis=0) for a in (right, answers))
    things = (asked == seen).all(0)
    exchanged = things & (answers.first != right.first)
    background = answers.background == right.background
    arrangement = (answers.arrangement == right.arrangement) & ~exchanged
    facts = {"things": things, "background": background, "arrangement": arrangement}
    facts["all"] = things & background & arrangement
    return {name: float(shown.mean()) for name, shown in facts.items()}


def evaluate(
    pipe: Pipeline, probe: Params, kind: str, n: int, seed: int = 0, batch_size: int = 16, **how: Any
) -> dict[str, float]:
    """Draws `n` prompts of a kind, and scores the pictures. Shows its progress.

    Args:
      seed: of prompts and pictures both.
      batch_size: pictures that a device draws at once.
      how: of `Pipeline.generate`: steps, sampler, guidance_scale.
    """
    prompts, drawn = zip(*prompts_for_evaluation(kind, n, seed), strict=True)
    images = []
    for first in tqdm(range(0, n, batch_size), desc=kind, unit="batch", leave=False):
        part = prompts[first : first + batch_size]
        images.append(pipe.generate(part, seed=seed, first_index=first, batch_size=batch_size, **how))
    return score(read(probe, np.concatenate(images)), drawn)
