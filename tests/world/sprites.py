"""A few things with plain shapes, drawn without the font: what the layouts and pictures are tested with."""

import functools

import numpy as np

from engine.world import atlas
from engine.world.scene import Scene, Thing

THINGS = (
    Thing("a", ("ball",), paints=True, held=True, rides=True),
    Thing("b", ("pole",), paints=True, carries=True),
    Thing("c", ("bar",), paints=True, carries=True),
    Thing("d", ("head",), eyes=(0.5, 0.5, 0.6), hand=(0.1, 0.7), paints=True, rides=True),
    Thing("e", ("glasses",), worn="eyes"),
    Thing("f", ("hat",), worn="head"),
)
SIZES = {
    "ball": (92, 92),
    "pole": (40, 92),
    "bar": (92, 30),
    "head": (92, 92),
    "glasses": (92, 36),
    "hat": (92, 60),
}
COLOURS = {
    "ball": (230, 120, 20),
    "pole": (30, 120, 220),
    "bar": (160, 160, 160),
    "head": (250, 200, 60),
    "glasses": (10, 10, 10),
    "hat": (120, 20, 160),
}


def _pixels(name: str) -> np.ndarray:
    """An ellipse (ball, head) or a box in the middle of the cell; the head has two dark eyes."""
    width, height = SIZES[name]
    y, x = np.mgrid[: atlas.SIDE, : atlas.SIDE] + 0.5 - atlas.SIDE / 2
    inside = (abs(x) < width / 2) & (abs(y) < height / 2)
    if name in ("ball", "head"):
        inside = np.hypot(2 * x / width, 2 * y / height) < 1
    cell = np.zeros((atlas.SIDE, atlas.SIDE, 4), np.uint8)
    cell[inside] = (*COLOURS[name], 255)
    if name == "head":
        cell[(np.hypot(abs(x) - 20, y) < 7)] = (20, 20, 20, 255)
    return cell


@functools.cache
def plain_atlas() -> atlas.Atlas:
    return atlas.from_pixels(THINGS, np.stack([_pixels(thing.name) for thing in THINGS]))


def scene(*things: str, relation: str | None = None, **changes) -> Scene:
    """A big thing in the middle of plain white, or two in a relation; with some fields changed."""
    n = len(things)
    fields = dict(
        colours=(None,) * n,
        sizes=("big",) * n,
        count=1,
        relation=relation,
        background="plain white",
        time="day",
        style="plain",
    )
    fields |= changes
    fields.setdefault("place", "middle" if n == 1 and fields["count"] == 1 else None)
    return Scene(things=things, **fields)
