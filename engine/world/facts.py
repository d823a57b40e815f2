"""A scene as numbered answers to fixed questions: what a text encoder and a probe are asked."""

from engine.world.scene import BACKGROUNDS, COLOURS, MOST, PLACES, RELATIONS, SIZES, STYLES, TIMES, Scene
from engine.world.things import INDEX, THINGS

SPOTS = (*PLACES, "underneath", "overhead", "worn", "held", "beside")
_SPOTS_OF = {  # of the first thing and the second
    "left of": ("left", "right"),
    "above": ("top", "bottom"),
    "on": ("middle", "underneath"),
    "under": ("middle", "overhead"),
    "riding": ("middle", "underneath"),
    "wearing": ("middle", "worn"),
    "holding": ("middle", "held"),
    "next to": ("middle", "beside"),
}

# Question -> how many answers it has. Where "none" is an answer, it is the last.
FACTS: dict[str, int] = {
    **dict.fromkeys(SPOTS, len(THINGS) + 1),  # what is there
    "first colour": len(COLOURS) + 1,
    "second colour": len(COLOURS) + 1,
    "first size": len(SIZES),
    "second size": len(SIZES) + 1,
    "count": MOST,  # answer 0 is one
    "relation": len(RELATIONS) + 1,
    "background": len(BACKGROUNDS),
    "time": len(TIMES),
    "style": len(STYLES),
}


def shown_colour(scene: Scene, which: int) -> str | None:
    """The colour that the picture shows: the paint, else the thing's own if it has exactly one."""
    own = THINGS[INDEX[scene.things[which]]].true_colours
    return scene.colours[which] or (own[0] if len(own) == 1 else None)


def facts(scene: Scene) -> tuple[int, ...]:
    """The scene as the answers to the questions of FACTS, in their order.

    Several of a kind count as being in the middle.
    """
    spots = _SPOTS_OF[scene.relation] if scene.relation else (scene.place or "middle",)
    there = {spot: INDEX[name] for spot, name in zip(spots, scene.things, strict=True)}
    shown = [shown_colour(scene, which) for which in range(len(scene.things))]
    colours = [len(COLOURS) if colour is None else COLOURS.index(colour) for colour in shown]
    sizes = [SIZES.index(size) for size in scene.sizes]
    return (
        *(there.get(spot, len(THINGS)) for spot in SPOTS),
        *(*colours, len(COLOURS))[:2],
        *(*sizes, len(SIZES))[:2],
        scene.count - 1,
        len(RELATIONS) if scene.relation is None else RELATIONS.index(scene.relation),
        BACKGROUNDS.index(scene.background),
        TIMES.index(scene.time),
        STYLES.index(scene.style),
    )
