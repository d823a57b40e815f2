"""Draws scenes, and addresses them: picture `index` of `seed` never depends on what was drawn before."""

import functools

import numpy as np
from jaxtyping import UInt8

from engine.scenes.backgrounds import BACKGROUNDS, paint
from engine.scenes.captions import tell
from engine.scenes.scene import Scene
from engine.scenes.sprites import Sprite, paste, sprite
from engine.scenes.things import INDEX, THINGS

VARIANTS = 256  # painted versions of each background, doubled by mirroring
JITTER = 0.08  # relative, of every size

# Sides as fractions of the picture, see `sprites.sprite`.
MIDDLE = {"small": 0.36, "big": 0.64}
ASIDE = {"small": 0.36, "big": 0.54}  # leaves room to be clearly left or right
PAIRED = {"small": 0.31, "big": 0.43}
WEARER = {"small": 0.42, "big": 0.58}  # its hat comes on top
OVERLAP = 0.045  # of what stands on something
FREE = 0.16  # of the picture, at least, between and around two things
MARGIN = 0.06


def example(
    seed: int, index: int, size: int = 64, easy: float = 0.0
) -> tuple[UInt8[np.ndarray, "S S 3"], str, Scene]:
    """Picture, caption and truth number `index` of `seed`: a pure function of its arguments."""
    text, scene, rng = tell(seed, index, easy)
    return render(scene, size, rng), text, scene


def batch(
    seed: int, first_index: int, n: int, size: int = 64, easy: float = 0.0
) -> tuple[UInt8[np.ndarray, "N S S 3"], list[str], list[Scene]]:
    """Examples first_index .. first_index + n - 1; `easy`: see `sample_scene`."""
    images = np.empty((n, size, size, 3), np.uint8)
    captions, scenes = [], []
    for i in range(n):
        images[i], text, scene = example(seed, first_index + i, size, easy)
        captions.append(text)
        scenes.append(scene)
    return images, captions, scenes


def render(scene: Scene, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """Draws the scene at size x size pixels; `rng` decides what the scene leaves open."""
    return draw(scene, size, rng)[0]


def draw(
    scene: Scene, size: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "S S 3"], list[tuple[int, int, int, int]]]:
    """The picture, and for each thing its box in pixels: left, top, right, bottom."""
    image = _background(scene.background, int(rng.random() * VARIANTS), size)
    image = image[:, ::-1].copy() if rng.random() < 0.5 else image.copy()
    placed = place(scene, size, rng)
    # What is worn lies over its wearer; else the first thing lies over what it stands on.
    for piece, x, y in placed if scene.arrangement == "wearing" else placed[::-1]:
        paste(image, piece, x, y)
    return image, [(x, y, x + piece.width, y + piece.height) for piece, x, y in placed]


@functools.cache
def _background(name: str, variant: int, size: int) -> np.ndarray:
    seed = BACKGROUNDS.index(name) * VARIANTS + variant
    return paint(name, size, np.random.default_rng(seed))


def _sprite(name: str, side: float, rng: np.random.Generator) -> Sprite:
    return sprite(INDEX[name], round(_jittered(side, rng)), bool(rng.random() < 0.5))


def _jittered(side: float, rng: np.random.Generator) -> float:
    return side * _near(1.0, JITTER, rng)


def _near(value: float, spread: float, rng: np.random.Generator) -> float:
    return value + spread * (2 * rng.random() - 1)


def place(scene: Scene, size: int, rng: np.random.Generator) -> list[tuple[Sprite, int, int]]:
    """The sprite of each thing with the x and y of its top left corner, in pixels."""
    if len(scene.things) == 1:
        return [_place_one(scene, size, rng)]
    if scene.arrangement == "wearing":
        return _place_worn(scene, size, rng)
    return _place_two(scene, size, rng)


def _place_one(scene: Scene, size: int, rng: np.random.Generator) -> tuple[Sprite, int, int]:
    sides = MIDDLE if scene.arrangement == "middle" else ASIDE
    piece = _sprite(scene.things[0], sides[scene.sizes[0]] * size, rng)
    margin = MARGIN * size * rng.random()
    room_x, room_y = size - piece.width, size - piece.height
    x, y = _near(0.5, 0.04, rng) * room_x, _near(0.5, 0.04, rng) * room_y
    match scene.arrangement:
        case "left":
            x = min(margin, room_x / 6)
        case "right":
            x = room_x - min(margin, room_x / 6)
        case "top":
            y = min(margin, room_y / 6)
        case "bottom":
            y = room_y - min(margin, room_y / 6)
    return piece, round(x), round(y)


def _place_two(scene: Scene, size: int, rng: np.random.Generator) -> list[tuple[Sprite, int, int]]:
    """Two things side by side, one above the other, or the first standing on the second."""
    beside, on = scene.arrangement == "left of", scene.arrangement == "on"
    indices = [INDEX[name] for name in scene.things]
    sides = [_jittered(PAIRED[s], rng) * size for s in scene.sizes]
    flips = [bool(rng.random() < 0.5) for _ in indices]
    first, second = map(sprite, indices, map(round, sides), flips)
    extent = first.width + second.width if beside else first.height + second.height
    if extent > (room := size if on else (1 - FREE) * size):
        first, second = map(sprite, indices, (int(side * room / extent) for side in sides), flips)
    if on:
        shift = round(_near(0.0, 0.04, rng) * size)
        drop = _drop(first, second, shift) - round(OVERLAP * size)
        x2 = round(_near(0.5, 0.12, rng) * (size - second.width))
        x1 = x2 + (second.width - first.width) // 2 + shift
        y1 = round(_near(0.55, 0.1, rng) * (size - drop - second.height))
        return [(first, x1, y1), (second, x2, y1 + drop)]
    if beside:
        x1, x2 = _apart(first.width, second.width, size, rng)
        foot = _near(0.68, 0.05, rng) * size
        y1, y2 = round(foot - first.height), round(foot - second.height)
    else:
        y1, y2 = _apart(first.height, second.height, size, rng)
        x1, x2 = (round(_near(0.5, 0.08, rng) * (size - piece.width)) for piece in (first, second))
    return [(first, x1, y1), (second, x2, y2)]


def _apart(first: int, second: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where two extents start: of what they leave free, 0.25 to 0.65 lies between them."""
    free = size - first - second
    return round(_near(0.275, 0.1, rng) * free), size - second - round(_near(0.275, 0.1, rng) * free)


def _drop(upper: Sprite, lower: Sprite, shift: int) -> int:
    """Rows from upper's top edge to lower's when upper, let fall, comes to rest on lower."""
    x = (lower.width - upper.width) // 2 + shift
    left, right = max(x, 0), min(x + upper.width, lower.width)
    bottom, top = upper.bottom[left - x : right - x], lower.top[left:right]
    both = (bottom >= 0) & (top < lower.height)
    return int((bottom[both] + 1 - top[both]).max()) if both.any() else upper.height


def _place_worn(scene: Scene, size: int, rng: np.random.Generator) -> list[tuple[Sprite, int, int]]:
    """The second thing over the eyes or on the head of the first."""
    wearer, worn = (THINGS[INDEX[name]] for name in scene.things)
    piece = _sprite(wearer.name, WEARER[scene.sizes[0]] * size, rng)
    x_eyes, y_eyes, across = wearer.eyes
    on_eyes = worn.worn == "eyes"
    side = across * piece.width * (0.8 if on_eyes else 0.9)
    worn_piece = sprite(INDEX[worn.name], round(side), bool(rng.random() < 0.5))
    dx = x_eyes * piece.width - worn_piece.width / 2
    dy = y_eyes * piece.height - worn_piece.height / 2 if on_eyes else 0.12 * piece.height - worn_piece.height
    above = max(0.0, -dy)
    x = _near(0.5, 0.12, rng) * (size - piece.width)
    y = above + _near(0.5, 0.2, rng) * (size - piece.height - above)
    return [(piece, round(x), round(y)), (worn_piece, round(x + dx), round(y + dy))]
