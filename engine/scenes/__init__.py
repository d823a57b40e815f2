"""The drawn world that the shipped model learned: emoji on painted backgrounds, with captions.

    image, caption, scene = example(seed=0, index=7, size=64)

`scene` chooses, `world` draws, `captions` tells; `things` and `backgrounds` hold what there is, and `styles`
draws it in other ways. Drawing needs the colour emoji font (see `sprites`); captions and words do not.
"""

from engine.scenes.backgrounds import BACKGROUNDS
from engine.scenes.captions import caption, told, vocabulary, words
from engine.scenes.scene import (
    ARRANGEMENTS,
    FACTS,
    PLACES,
    RELATIONS,
    SIZES,
    Labels,
    Scene,
    facts,
    labels,
    sample_scene,
)
from engine.scenes.styles import STYLES, restyle
from engine.scenes.things import THINGS, Thing
from engine.scenes.world import batch, draw, example, render

__all__ = [
    "ARRANGEMENTS",
    "BACKGROUNDS",
    "FACTS",
    "PLACES",
    "RELATIONS",
    "SIZES",
    "STYLES",
    "THINGS",
    "Labels",
    "Scene",
    "Thing",
    "batch",
    "caption",
    "draw",
    "example",
    "facts",
    "labels",
    "render",
    "restyle",
    "sample_scene",
    "told",
    "vocabulary",
    "words",
]
