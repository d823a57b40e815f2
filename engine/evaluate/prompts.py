"""Prompts for measuring: their scenes are known, and all that they state can be read from a picture."""

import numpy as np

from engine import world
from engine.types import UserError
from engine.world.sampling import combinations, is_held_out

KINDS = ("thing", "colour", "count", "relation", "style")
ATTRIBUTES = KINDS[1:]  # what can be held out of training
_OF_ONE = ("colour", "count", "time", "style")  # in the middle of a combination; a relation is the rest


def prompts(kind: str, held_out: bool, n: int, seed: int = 0) -> list[tuple[str, world.Scene]]:
    """`n` prompts with their scenes, which are drawn as for training but from numbers that no training uses.

    Args:
      kind: "thing": one as it is, in no style; "colour": one that is painted; "count": two to four of a
        kind; "relation": two things; "style": one thing.
      held_out: whether the colour, count, relation or style of this thing is a combination that no training
        sees. All else of every prompt is combined as in training.

    Raises:
      UserError: an unknown kind, or held-out ones of "thing", which combines nothing.
    """
    known = ATTRIBUTES if held_out else KINDS
    if kind not in known:
        raise UserError(f"kind of {'held-out ' * held_out}prompts {kind!r}: write one of {', '.join(known)}")
    rng = np.random.Generator(np.random.Philox(key=[2**33 + seed, 2 * KINDS.index(kind) + held_out]))
    found = []
    while len(found) < n:
        scene = world.sample_scene(rng, held_out=held_out)
        if _is_of(scene, kind) and (not held_out or _held_out_in(scene) == {kind}):
            found.append((world.caption(scene, rng, exact=True), scene))
    return found


def _is_of(scene: world.Scene, kind: str) -> bool:
    alone = scene.relation is None and scene.count == 1
    return {
        "thing": alone and scene.colours == (None,) and scene.style == "plain",
        "colour": alone and scene.colours != (None,),
        "count": scene.count > 1,
        "relation": scene.relation is not None,
        "style": alone and scene.style != "plain",
    }[kind]


def _held_out_in(scene: world.Scene) -> set[str]:
    """In which respects the scene combines what no training does."""
    held = [middle for _, middle, _ in filter(is_held_out, combinations(scene))]
    return {middle if middle in _OF_ONE else "relation" for middle in held}
