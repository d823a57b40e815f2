"""The backgrounds of the drawn world: painted once on the host, kept as a table on the device.

Each of BACKGROUNDS is painted in a number of variants; mirroring, zoom, shift and light (the layout's)
make more of them. What time of day it is, is not painted: see `engine.world.light`.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from engine.world import outdoors
from engine.world.canvas import Canvas
from engine.world.scene import BACKGROUNDS

SUPERSAMPLE = 2


def _underwater(c: Canvas) -> None:
    c.gradient([(0.0, 0x3CC8D8), (0.5, 0x1583B5), (1.0, 0x0A4A80)])
    for x in c.rng.uniform(0, 1, 4):
        lean = c.x - x - 0.35 * c.y
        c.fill(0xBDF4F4, 0.28 * np.exp(-((lean / 0.04) ** 2)) * np.clip(1 - c.y / 0.8, 0, 1))
    for x in np.concatenate([c.rng.uniform(0, 0.3, 2), c.rng.uniform(0.7, 1, 2)]):  # weed
        tall, sway = c.rng.uniform(0.25, 0.45), c.rng.uniform(0.015, 0.03)
        weed = np.abs(c.x - x - sway * np.sin(22 * c.y + 40 * x)) < 0.016
        c.fill(0x2F8F5B, 0.85 * weed * (c.y > 0.9 - tall), 8.0)
    for x in c.rng.uniform(0, 1, 2):  # coral
        rgb = int(c.rng.choice([0xF0708A, 0xF59A4A, 0xB86AD0]))
        for turn in (-0.5, 0.0, 0.5):
            c.line(x, 0.92, x + 0.14 * np.sin(turn), 0.92 - 0.15 * np.cos(turn), 0.03, rgb)
    c.ground(0.88 + 0.03 * c.wave(2), 0xD8C48A, 0.3)
    for _ in range(int(c.rng.integers(8, 14))):
        x, y, radius = c.rng.uniform(0, 1), c.rng.uniform(0, 0.85), c.rng.uniform(0.012, 0.028)
        c.disc(x, y, radius, 0xD6F7FA, 0.012, 0.75)
        c.disc(x, y, 0.55 * radius, 0x3FA5C8, 0.012, 0.6)


def _space(c: Canvas) -> None:
    c.gradient([(0.0, 0x05030F), (1.0, 0x140A2E)])
    for rgb in (0x6B2C91, 0x1E4C9A):
        cloud = np.clip(c.noise(4) * 0.7 + c.noise(9) * 0.3 - 0.5, 0, 1)
        c.fill(rgb, 1.3 * np.clip(cloud, 0, 0.7), 12.0)
    c.dots(int(c.rng.integers(60, 90)), 0xFFFFFF, 0.0, 1.0, 0.006, 1.0)
    for corner in c.rng.permutation(4)[:2]:
        x, y = [(0.14, 0.14), (0.86, 0.14), (0.14, 0.86), (0.86, 0.86)][corner]
        radius = c.rng.uniform(0.08, 0.13)
        c.disc(x, y, radius, int(c.rng.choice([0xD9824A, 0x58B0C9, 0xC9586B, 0xC9B458])))
        c.disc(x - 0.3 * radius, y - 0.2 * radius, 0.3 * radius, 0xFFFFFF, 0.05, 0.35)
        if c.rng.random() < 0.6:
            slant = c.x - x + 3.5 * (c.y - y - 0.25 * (c.x - x))
            ring = np.hypot((c.x - x) / 1.8, (c.y - y + 0.25 * (c.x - x)) / 0.45)
            behind = (np.hypot(c.x - x, c.y - y) < radius) & (c.y < y - 0.25 * (c.x - x)) & (slant == slant)
            c.fill(0xEAD9B0, c.soft(0.018 - np.abs(ring - radius)) * ~behind)


def _kitchen(c: Canvas) -> None:
    """Tiles, cupboards, a stove under its hood and a sink, over a chequered floor."""
    c.gradient([(0.0, 0xF7EFD9), (1.0, 0xF1E6C8)])
    counter, wood = c.rng.uniform(0.52, 0.56), int(c.rng.choice([0x5FA3A0, 0xC98F55, 0x7C9CC4, 0xB8624A]))
    tiles = ((c.x * 14 % 1) < 0.08) | ((c.y * 14 % 1) < 0.08)
    c.fill(0xC9BFA6, 0.7 * tiles * (c.y < counter))
    stove = c.rng.choice([0.12, 0.64])
    for x in np.arange(0, 1, 0.25):
        if not stove - 0.2 < x < stove + 0.2:
            c.box(x + 0.008, 0.03, x + 0.242, 0.27, wood, 2.0)
            c.box(x + 0.035, 0.06, x + 0.215, 0.24, wood + 0x121212, 1.0)
            c.disc(x + 0.2, 0.2, 0.011, 0xF7F2E0)
    c.triangle(stove + 0.12, 0.0, 0.26, 0.16, 0x9DA5AD)
    c.box(0, counter, 1, counter + 0.035, 0xE9E4DC)
    c.box(0, counter + 0.035, 1, 0.8, wood, 2.0)
    for x in np.arange(0, 1, 0.25):
        c.box(x + 0.03, counter + 0.07, x + 0.22, 0.77, wood + 0x121212, 1.0)
        c.line(x + 0.09, counter + 0.1, x + 0.16, counter + 0.1, 0.012, 0xF7F2E0)
    c.box(stove, counter - 0.01, stove + 0.26, 0.8, 0xD7DBE0)
    c.box(stove + 0.03, counter + 0.1, stove + 0.23, 0.74, 0x30353C)
    for knob in (0.05, 0.1, 0.16, 0.21):
        c.disc(stove + knob, counter + 0.05, 0.013, 0x40454C)
    c.box(stove + 0.05, counter - 0.09, stove + 0.19, counter - 0.01, 0xC0392B)  # a pot
    c.box(stove + 0.03, counter - 0.1, stove + 0.21, counter - 0.085, 0x8E2A20)
    floor = ((c.x * 8).astype(int) + ((c.y - 0.8) * 14).astype(int)) % 2
    c.ground(0.8, 0xF3EEE6)
    c.fill(0x9CA8B0, (floor == 1) * (c.y > 0.8))


def _living_room(c: Canvas) -> None:
    """A sofa, a floor lamp and a picture on the wall, over a wooden floor with a rug."""
    wall = int(c.rng.choice([0xE6D5B8, 0xC9D8C5, 0xD9C7D6, 0xC6D3E0]))
    c.gradient([(0.0, wall), (1.0, wall)])
    side, floor = c.rng.choice([-1, 1]), 0.7
    c.fill(0xB07A48, c.y > floor)
    c.fill(0x7F5530, 0.6 * (((c.y - floor) * 16 % 1) < 0.1) * (c.y > floor))
    c.box(0, floor - 0.025, 1, floor, 0xFBF7EF)
    picture = 0.5 + side * 0.22
    c.box(picture - 0.14, 0.08, picture + 0.14, 0.29, 0x6B4A2B)
    c.box(picture - 0.12, 0.1, picture + 0.12, 0.27, 0x9CCBE8)
    c.triangle(picture + 0.02, 0.14, 0.27, 0.09, 0x6F8F5A)
    window = 0.5 - side * 0.17
    c.box(window - 0.15, 0.07, window + 0.15, 0.36, 0xFFFFFF)
    for half in (-0.14, 0.005):
        c.box(window + half, 0.08, window + half + 0.135, 0.35, 0x9FD6F5)
    cloth = int(c.rng.choice([0xC0504D, 0x4F81BD, 0x5B8C5A, 0x8064A2, 0xD99A4E]))
    c.box(0.2, 0.44, 0.8, 0.7, cloth, 2.0)
    c.disc(0.22, 0.46, 0.05, cloth), c.disc(0.78, 0.46, 0.05, cloth)
    c.box(0.14, 0.54, 0.24, 0.78, cloth - 0x101010, 1.0)
    c.box(0.76, 0.54, 0.86, 0.78, cloth - 0x101010, 1.0)
    for seat in (0.24, 0.5):
        c.box(seat + 0.003, 0.61, seat + 0.257, 0.7, cloth + 0x141414, 1.0)
    c.box(0.24, 0.7, 0.76, 0.77, cloth - 0x181818, 1.0)
    lamp = 0.5 + side * 0.43
    c.line(lamp, 0.8, lamp, 0.36, 0.016, 0x4A4038)
    c.triangle(lamp, 0.2, 0.4, 0.1, 0xFFE2A0)
    c.glow(lamp, 0.38, 0.12, 0xFFF0C0, 0.5)
    c.oval(0.5, 0.9, 0.4, 0.07, int(c.rng.choice([0xB5524A, 0x3F6F8F, 0xE2D6BC])))
    c.oval(0.5, 0.9, 0.33, 0.05, 0xE8D9B5)


def _stage(c: Canvas) -> None:
    """Red curtains drawn aside, spotlights, boards."""
    c.gradient([(0.0, 0x1A0F1E), (1.0, 0x3A2140)])
    for x, foot in ((0.2, 0.35), (0.5, 0.5), (0.8, 0.65)):
        middle = x + (foot - x) * c.y / 0.8 + c.rng.uniform(-0.03, 0.03)
        beam = np.clip(1 - np.abs(c.x - middle) / (0.02 + 0.17 * c.y), 0, 1)
        c.fill(0xFFF2C9, 0.42 * beam * (c.y < 0.86))
    c.ground(0.8, 0x9A6538, 0.25)
    c.fill(0x5E3A1E, 0.6 * (((c.x - 0.5) / (c.y - 0.5) * 5 % 1) < 0.1) * (c.y > 0.8))
    c.oval(0.5, 0.88, 0.34, 0.07, 0xFFE9B0, 0.05, 0.55)
    width = 0.15 + 0.05 * np.cos(np.clip(c.y, 0, 0.9) * 4.5 + 0.5)
    folds = 0.5 + 0.5 * np.sin(70 * np.minimum(c.x, 1 - c.x) / (width / 0.15) + c.rng.random())
    curtain = c.soft(width - np.minimum(c.x, 1 - c.x)) * (c.y < 0.88)
    c.fill(0xC01F2E, curtain)
    c.fill(0x6E0D18, 0.8 * curtain * folds)
    drape = 0.1 + 0.045 * np.abs(np.sin(np.pi * 4 * c.x))
    c.fill(0xB01A28, c.soft(drape - c.y))
    c.fill(0xE8B94A, c.soft(0.009 - np.abs(drape - c.y)))


def _plain(rgb: int) -> Callable[[Canvas], None]:
    def paint_plain(c: Canvas) -> None:
        c.gradient([(0.0, rgb), (1.0, rgb)])
        c.image *= 1 - 0.12 * np.clip(c.y - 0.75, 0, 1)[..., None]
        c.glow(c.rng.uniform(0.3, 0.7), 0.4, 0.4, 0xFFFFFF, 0.05)

    return paint_plain


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "meadow": outdoors.meadow,
    "forest": outdoors.forest,
    "beach": outdoors.beach,
    "sea": outdoors.sea,
    "underwater": _underwater,
    "desert": outdoors.desert,
    "mountains": outdoors.mountains,
    "snow": outdoors.snow,
    "city": outdoors.city,
    "street": outdoors.street,
    "farm": outdoors.farm,
    "garden": outdoors.garden,
    "jungle": outdoors.jungle,
    "sky": outdoors.sky,
    "space": _space,
    "kitchen": _kitchen,
    "living room": _living_room,
    "stage": _stage,
    "plain white": _plain(0xF4F4F2),
    "plain blue": _plain(0x3F6FD8),
    "plain yellow": _plain(0xF5D656),
    "plain pink": _plain(0xF2A0BE),
}


def paint(name: str, size: int, variant: int) -> UInt8[np.ndarray, "S S 4"]:
    """One version of the background by day: a pure function of its arguments.

    Returns:
      RGB, and in the last channel sky (high four bits) and light at night (low four), each 0..15.
    """
    rng = np.random.default_rng((BACKGROUNDS.index(name), variant))
    canvas = Canvas(SUPERSAMPLE * size, rng)
    PAINTERS[name](canvas)
    layers = np.concatenate([canvas.image / 255, np.stack([canvas.sky, canvas.light], -1)], -1)
    small = layers.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE, 5).mean((1, 3)).clip(0, 1)
    rgb, masks = np.uint8(small[..., :3] * 255 + 0.5), np.uint8(small[..., 3:] * 15 + 0.5)
    return np.concatenate([rgb, masks[..., :1] << 4 | masks[..., 1:]], -1)


def table(variants: int, size: int) -> UInt8[np.ndarray, "N V S S 4"]:
    """Every background in `variants` versions, in the order of BACKGROUNDS; 10 to 40 ms a version."""
    return np.stack([[paint(name, size, v) for v in range(variants)] for name in BACKGROUNDS])
