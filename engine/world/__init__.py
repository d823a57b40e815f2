"""The drawn world: what the shipped model learns. Words on one side, pictures on the other.

    images, captions, scenes = batch(seed=0, first_index=0, n=16, size=128)

`sampling` chooses and holds out, `captions` tells, `layout` places and `compose` draws, on the device, from
the sprites in `atlas` and the painted `backgrounds`; `things` holds what there is.
"""

from engine.world.captions import caption, retold, tell, told, words
from engine.world.drawing import batch, draw
from engine.world.facts import FACTS, facts
from engine.world.sampling import held_out, sample_scene
from engine.world.scene import Scene, Thing
from engine.world.things import THINGS

__all__ = [
    "FACTS",
    "THINGS",
    "Scene",
    "Thing",
    "batch",
    "caption",
    "draw",
    "facts",
    "held_out",
    "retold",
    "sample_scene",
    "tell",
    "told",
    "words",
]
