"""Where everything of a scene is drawn: numpy, on the host, a few hundred numbers a picture.

Lengths are fractions of the picture, x runs right and y down. What a caption states is drawn so that a
stranger would say the same; what it leaves open is random.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.world.atlas import Atlas
from engine.world.scene import BACKGROUNDS, COLOURS, MOST, STYLES, TIMES, Scene

JITTER = 0.07  # relative, of every size
EDGE = 0.02  # of the picture that stays free around everything

# Sides of things as fractions of the picture, see `_cell`.
MIDDLE = {"small": 0.33, "big": 0.64}
ASIDE = {"small": 0.33, "big": 0.52}  # leaves room to be clearly left or right
PAIRED = {"small": 0.28, "big": 0.43}
WEARER = {"small": 0.42, "big": 0.60}  # its hat comes on top
HOLDER = {"small": 0.44, "big": 0.60}
CARRIER = {"small": 0.40, "big": 0.56}
RIDER = {"small": 0.26, "big": 0.36}
COUNTED = {2: {"small": 0.28, "big": 0.42}, 3: {"small": 0.24, "big": 0.34}, 4: {"small": 0.22, "big": 0.34}}


class Layout(NamedTuple):
    """A scene as numbers, or a batch of them with a leading axis; sprites from the farthest to the nearest.

    Attributes:
      thing: (4,) int32, which of the scene's things each sprite is: 0 or 1; -1 where there is none.
      sprite: (4,) int32, number in the atlas.
      centre: (4, 2) float32, x and y of the middle of its cell.
      side: (4,) float32, of the cell.
      angle: (4,) float32, radians, counter-clockwise as seen.
      mirrored: (4,) bool.
      tint: (4,) int32, 0 for none, else 1 + the index in COLOURS.
      shadow: (4, 4) float32: x, y, half width and strength of the shadow on the ground.
      background, time, style: () int32, indices in BACKGROUNDS, TIMES, STYLES.
      variant: () int32, which of the background's painted versions, modulo their number.
      flipped: () bool, the background mirrored.
      chance: (8,) float32, 0..1: what else of background, light and paper is open.
    """

    thing: np.ndarray
    sprite: np.ndarray
    centre: np.ndarray
    side: np.ndarray
    angle: np.ndarray
    mirrored: np.ndarray
    tint: np.ndarray
    shadow: np.ndarray
    background: np.ndarray
    time: np.ndarray
    style: np.ndarray
    variant: np.ndarray
    flipped: np.ndarray
    chance: np.ndarray


@dataclasses.dataclass
class Placed:
    """One sprite while it is being placed: `x`, `y` the middle of its cell, `side` the cell's."""

    atlas: Atlas
    thing: int
    sprite: int
    tint: int
    side: float
    mirrored: bool
    angle: float = 0.0
    x: float = 0.5
    y: float = 0.5
    grounded: bool = True

    @property
    def width(self) -> float:
        return self.side * float(self.atlas.extent[self.sprite, 0])

    @property
    def height(self) -> float:
        return self.side * float(self.atlas.extent[self.sprite, 1])

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of what is drawn, but for the angle."""
        w, h = self.width / 2, self.height / 2
        return self.x - w, self.y - h, self.x + w, self.y + h

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where the point (x, y), fractions of what is drawn, comes to lie in the picture."""
        across = (0.5 - x if self.mirrored else x - 0.5) * self.width
        return self.x + across, self.y + (y - 0.5) * self.height

    def edge(self, which: str, xs: np.ndarray) -> np.ndarray:
        """The height of its 'top' or 'bottom' edge at `xs` in the picture; nan where it has none there."""
        rows = getattr(self.atlas, which)[self.sprite]
        column = (xs - self.x) / self.side
        column = np.floor((0.5 + (-column if self.mirrored else column)) * len(rows)).astype(int)
        inside = (column >= 0) & (column < len(rows))
        found = rows[np.clip(column, 0, len(rows) - 1)]
        empty = 1.0 if which == "top" else 0.0
        return np.where(inside & (found != empty), self.y + (found - 0.5) * self.side, np.nan)


def layout(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> Layout:
    """One picture's layout, arrays without a batch axis; a pure function of the scene and the generator.

    Raises:
      KeyError: a thing of the scene is not in the atlas.
    """
    group = _place(scene, atlas, rng)
    _fit(group)
    return _pack(scene, group, rng)


def layouts(scenes: Sequence[Scene], atlas: Atlas, rngs: Sequence[np.random.Generator]) -> Layout:
    """A batch, arrays with a leading axis; each as `layout` draws it alone."""
    singles = [layout(scene, atlas, rng) for scene, rng in zip(scenes, rngs, strict=True)]
    return Layout(*map(np.stack, zip(*singles, strict=True)))


def _near(value: float, spread: float, rng: np.random.Generator) -> float:
    return value + spread * (2 * rng.random() - 1)


def _cell(atlas: Atlas, sprite: int, side: float) -> float:
    """The cell's side for a thing as large as `side`.

    That is the geometric mean of width and height, held between 0.8 and 1 of the longer one, so that a
    flat skateboard and a tall penguin look about as large as a round ball.
    """
    width, height = map(float, atlas.extent[sprite])
    return side / max((width * height) ** 0.5, 0.8 * max(width, height))


def _new(scene: Scene, which: int, side: float, atlas: Atlas, rng: np.random.Generator, tilt=4.0) -> Placed:
    """The scene's thing, of that size with jitter, tilted by up to `tilt` degrees; not yet placed."""
    sprite = atlas.index[scene.things[which]]
    colour = scene.colours[which]
    return Placed(
        atlas,
        which,
        sprite,
        0 if colour is None else 1 + COLOURS.index(colour),
        _cell(atlas, sprite, side * _near(1.0, JITTER, rng)),
        bool(rng.random() < 0.5),
        np.deg2rad(_near(0.0, tilt, rng)),
    )


def _place(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """All sprites of the scene, from the farthest to the nearest."""
    if scene.relation is None:
        return [_alone(scene, atlas, rng)] if scene.count == 1 else _counted(scene, atlas, rng)
    place = {
        "left of": _beside,
        "next to": _beside,
        "above": _above,
        "under": _under,
        "on": _on,
        "riding": _riding,
        "wearing": _wearing,
        "holding": _holding,
    }[scene.relation]
    return place(scene, atlas, rng)


def _alone(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> Placed:
    sides = MIDDLE if scene.place == "middle" else ASIDE
    one = _new(scene, 0, sides[scene.sizes[0]], atlas, rng, 6.0)
    one.x, one.y = _near(0.5, 0.04, rng), _near(0.53, 0.03, rng)
    aside = EDGE + 0.05 * rng.random()
    match scene.place:
        case "left":
            one.x = aside + one.width / 2
        case "right":
            one.x = 1 - aside - one.width / 2
        case "top":
            one.y = aside + one.height / 2
        case "bottom":
            one.y = 1 - aside - one.height / 2
    one.grounded = scene.place != "top"
    return one


def _counted(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """Loose rows: each has a slot of its own and keeps within it."""
    rows = {2: [2], 3: [3] if rng.random() < 0.5 else [1, 2], 4: [2, 2] if rng.random() < 0.7 else [4]}
    if scene.sizes[0] == "big":
        rows[4] = [2, 2]  # in one row they would be small
    group, rows = [], rows[scene.count]
    tall = min(0.92 / len(rows), 0.5)
    for row, n in enumerate(rows):
        foot = 0.5 + tall * (row + 1 - len(rows) / 2)
        for column in range(n):
            one = _new(scene, 0, COUNTED[scene.count][scene.sizes[0]], atlas, rng)
            wide = 0.94 / max(rows)
            one.side *= min(1, 0.94 * wide / one.width, 0.94 * tall / one.height)
            spare_x, spare_y = (wide - one.width) / 2, (tall - one.height) / 2
            one.x = 0.5 + (column - (n - 1) / 2) * wide + _near(0, 0.7 * spare_x, rng)
            one.y = foot - tall / 2 + min(spare_y, 0.1) + _near(0, 0.4 * spare_y, rng)
            group.append(one)
    return group


def _beside(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """Side by side on one ground: 'left of' with room between them, 'next to' close, in either order."""
    pair = [_new(scene, i, PAIRED[scene.sizes[i]], atlas, rng) for i in (0, 1)]
    close = scene.relation == "next to"
    gap = _near(0.035, 0.015, rng) if close else _near(0.13, 0.04, rng)
    if (extent := pair[0].width + pair[1].width) > (room := 1 - 2 * EDGE - gap):
        for one in pair:
            one.side *= room / extent
    left, right = pair[::-1] if close and rng.random() < 0.5 else pair
    start = rng.random() * max(1 - 2 * EDGE - left.width - gap - right.width, 0) * 0.6
    start += 0.2 * max(1 - 2 * EDGE - left.width - gap - right.width, 0)
    left.x = EDGE + start + left.width / 2
    right.x = left.x + left.width / 2 + gap + right.width / 2
    foot = _near(0.78, 0.05, rng)
    for one in pair:
        one.y = foot - one.height / 2 + _near(0, 0.012, rng)
    return pair


def _above(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """The first high over the second, with air between."""
    high, low = (_new(scene, i, PAIRED[scene.sizes[i]], atlas, rng) for i in (0, 1))
    _stack(high, low, _near(0.09, 0.03, rng), rng)
    high.grounded = False
    return [low, high]


def _under(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """The first sheltered by the second: before its trunk or handle, its roof high above."""
    low, high = (_new(scene, i, PAIRED[scene.sizes[i]], atlas, rng) for i in (0, 1))
    low.side, high.side = 0.9 * low.side, 1.25 * high.side
    _stack(high, low, -min(0.32 * high.height, 0.55 * low.height), rng)
    high.grounded = False
    return [high, low]


def _stack(high: Placed, low: Placed, gap: float, rng: np.random.Generator) -> None:
    """One above the other, with the gap between their edges."""
    if (extent := high.height + low.height) > (room := 1 - 2 * EDGE - gap):
        for one in (high, low):
            one.side *= room / extent
    spare = 1 - 2 * EDGE - gap - high.height - low.height
    high.y = EDGE + spare * _near(0.5, 0.3, rng) + high.height / 2
    low.y = high.y + high.height / 2 + gap + low.height / 2
    low.x = _near(0.5, 0.1, rng)
    high.x = low.x + _near(0, 0.04, rng)


def _rest(upper: Placed, lower: Placed, reach: float) -> float:
    """The y at which `upper`, let fall, rests on `lower`: on the outline within `reach` of its middle.

    `reach` is a fraction of the narrower one's width; in empty columns there is nothing to rest on.
    """
    half = reach * min(upper.width, lower.width) / 2
    xs = np.linspace(upper.x - half, upper.x + half, 33)
    room = lower.edge("top", xs) - (upper.edge("bottom", xs) - upper.y)
    return float(np.nanmin(room)) if not np.isnan(room).all() else lower.box[1] - upper.height / 2


def _on(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """The first stands on the second."""
    upper, lower = (_new(scene, i, PAIRED[scene.sizes[i]], atlas, rng, 0.0) for i in (0, 1))
    _carry(upper, lower, _near(0.0, 0.05, rng), 0.9, 0.05, rng)
    return [lower, upper]


def _riding(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """The first sits on the second's back, its lower part hidden by what it rides; both look the same way."""
    rider = _new(scene, 0, RIDER[scene.sizes[0]], atlas, rng, 3.0)
    carrier = _new(scene, 1, CARRIER[scene.sizes[1]], atlas, rng, 0.0)
    rider.mirrored = carrier.mirrored
    # The font's animals and vehicles look left: their backs are right of the middle.
    back = 0.09 * carrier.width * (-1 if carrier.mirrored else 1)
    sunk = min(0.2 * rider.height, 0.22 * carrier.height)
    _carry(rider, carrier, back, 0.5, sunk / rider.height, rng)
    return [rider, carrier]


def _carry(upper: Placed, lower: Placed, shift: float, reach: float, sunk: float, rng) -> None:
    """Puts `upper` on top of `lower`, sunk in by that share of its height; the pair about the middle."""
    lower.x, lower.y = _near(0.5, 0.06, rng), 0.6
    upper.x = lower.x + shift
    upper.y = _rest(upper, lower, reach) + sunk * upper.height
    tall = lower.box[3] - upper.box[1]
    drop = _near(0.56, 0.06, rng) - (upper.box[1] + tall / 2)
    upper.y, lower.y, upper.grounded = upper.y + drop, lower.y + drop, False


def _wearing(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """The second over the eyes, or on the head, of the first."""
    wearer = _new(scene, 0, WEARER[scene.sizes[0]], atlas, rng, 0.0)
    worn = _new(scene, 1, 0.3, atlas, rng, 0.0)
    thing = atlas.things[wearer.sprite]
    if thing.eyes is None:
        raise ValueError(f"{thing.name} has no eyes to wear {scene.things[1]} at")
    wearer.x, wearer.y = _near(0.5, 0.1, rng), _near(0.57, 0.05, rng)
    x_eyes, y_eyes, across = thing.eyes
    worn.x, worn.y = wearer.at(x_eyes, y_eyes)
    across *= wearer.width
    share = atlas.extent[worn.sprite, 0]
    worn.grounded = False
    if atlas.things[worn.sprite].worn == "eyes":
        worn.side = 1.08 * across / share
        return [wearer, worn]
    worn.side = min(1.05 * across / share, 0.62 * wearer.height / atlas.extent[worn.sprite, 1])
    # Its brim covers the top of the head, above the eyes.
    brim = min(wearer.edge("top", np.array([worn.x])).item() + 0.14 * wearer.height, worn.y - 0.12 * across)
    worn.y = brim - worn.height / 2
    return [wearer, worn]


def _holding(scene: Scene, atlas: Atlas, rng: np.random.Generator) -> list[Placed]:
    """The second, small, at the hand of the first and before it."""
    holder = _new(scene, 0, HOLDER[scene.sizes[0]], atlas, rng, 3.0)
    share = {"small": 0.40, "big": 0.54}[scene.sizes[1]]
    held = _new(scene, 1, share * HOLDER[scene.sizes[0]], atlas, rng, 6.0)
    hand = atlas.things[holder.sprite].hand
    if hand is None:
        raise ValueError(f"{scene.things[0]} has no hand to hold {scene.things[1]} with")
    holder.x, holder.y = _near(0.5, 0.08, rng), _near(0.54, 0.05, rng)
    x, y = holder.at(*hand)
    held.x, held.y, held.grounded = x, y - 0.15 * held.height, False  # held by its lower half
    return [holder, held]


def _fit(group: list[Placed]) -> None:
    """Moves the group into the picture; makes it smaller first where it is larger."""
    left, top, right, bottom = _bounds(group)
    scale = min(1.0, (1 - 2 * EDGE) / max(right - left, bottom - top))
    for one in group:
        one.x, one.y, one.side = left + (one.x - left) * scale, top + (one.y - top) * scale, one.side * scale
    left, top, right, bottom = _bounds(group)
    dx = max(EDGE - left, 0) - max(right - 1 + EDGE, 0)
    dy = max(EDGE - top, 0) - max(bottom - 1 + EDGE, 0)
    for one in group:
        one.x, one.y = one.x + dx, one.y + dy


def _bounds(group: list[Placed]) -> np.ndarray:
    boxes = np.array([one.box for one in group])
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


def _pack(scene: Scene, group: list[Placed], rng: np.random.Generator) -> Layout:
    """The group as arrays of MOST rows, with what else is random."""

    def rows(values, dtype, empty=0):
        filled = np.full((MOST, *np.shape(values[0])), empty, dtype)
        filled[: len(values)] = values
        return filled

    shadows = [
        (one.x, one.box[3] - 0.02 * one.height, 0.46 * one.width, 1.0 if one.grounded else 0.0)
        for one in group
    ]
    return Layout(
        thing=rows([one.thing for one in group], np.int32, -1),
        sprite=rows([one.sprite for one in group], np.int32),
        centre=rows([(one.x, one.y) for one in group], np.float32, 0.5),
        side=rows([one.side for one in group], np.float32, 1.0),
        angle=rows([one.angle for one in group], np.float32),
        mirrored=rows([one.mirrored for one in group], bool),
        tint=rows([one.tint for one in group], np.int32),
        shadow=rows(shadows, np.float32),
        background=np.int32(BACKGROUNDS.index(scene.background)),
        time=np.int32(TIMES.index(scene.time)),
        style=np.int32(STYLES.index(scene.style)),
        variant=np.int32(rng.integers(1 << 20)),
        flipped=np.bool_(rng.random() < 0.5),
        chance=rng.random(8).astype(np.float32),
    )
