"""The backgrounds of the drawn world, painted with numpy.

A painter gets a `Canvas` and a generator, and draws from far to near. Lengths are fractions of the
picture; colours are 0xRRGGBB. Everything is painted at twice the size and averaged down.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

SUPERSAMPLE = 2


class Canvas:
    """A square float image with the few brushes that the painters need."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng = size, rng
        self.x, self.y = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size] * 2)
        self.image = np.zeros((size, size, 3), np.float32)

    def colour(self, rgb: int, spread: float = 8.0) -> np.ndarray:
        """The colour, moved a little at random: lightness together, channels less."""
        channels = np.array([rgb >> 16, rgb >> 8 & 255, rgb & 255], np.float32)
        moved = channels + self.rng.normal(0, spread) + self.rng.normal(0, spread / 2, 3)
        return np.clip(moved, 0, 255).astype(np.float32)

    def fill(self, colour: np.ndarray, mask: np.ndarray) -> None:
        """Blends the colour in by the mask (S, S), 0..1."""
        self.image += mask[..., None] * (colour - self.image)

    def gradient(self, stops: list[tuple[float, int]], top: float = 0.0, bottom: float = 1.0) -> None:
        """Colours from `top` to `bottom`, at heights 0..1 between them; all above and below is kept."""
        heights, colours = zip(*((top + at * (bottom - top), self.colour(c)) for at, c in stops), strict=True)
        column = self.y[:, 0]
        rows = np.stack([np.interp(column, heights, channel) for channel in np.array(colours).T], -1)
        inside = (column >= top) & (column <= bottom)
        self.image[inside] = rows[inside, None]

    def disc(
        self, x: float, y: float, radius: float, rgb: int, soft: float = 0.01, opacity: float = 1.0
    ) -> None:
        distance = np.hypot(self.x - x, self.y - y)
        self.fill(self.colour(rgb, 4.0), opacity * np.clip((radius - distance) / soft + 0.5, 0, 1))

    def glow(self, x: float, y: float, radius: float, rgb: int, opacity: float) -> None:
        square = (self.x - x) ** 2 + (self.y - y) ** 2
        self.fill(self.colour(rgb, 4.0), opacity * np.exp(-square / (2 * radius**2)))

    def wave(self, waves: int, low: float = 1.0, high: float = 4.0) -> np.ndarray:
        """A smooth random line (S,), about -1..1, of so many sines of `low` to `high` periods."""
        periods, phases = self.rng.uniform(low, high, waves), self.rng.uniform(0, 2 * np.pi, waves)
        lines = np.sin(2 * np.pi * periods[:, None] * self.x[0] + phases[:, None]) / periods[:, None]
        return (lines.sum(0) / np.abs(1 / periods).sum()).astype(np.float32)

    def ground(self, height: float | np.ndarray, rgb: int, darker: float = 0.0) -> None:
        """Everything below the line `height` (a number or (S,)); darkens by that share to the foot."""
        line = np.broadcast_to(height, self.x[0].shape)
        mask = np.clip((self.y - line) * self.size + 0.5, 0, 1)
        shade = 1 - darker * np.clip((self.y - line) / max(1 - float(line.min()), 1e-3), 0, 1)
        self.image += mask[..., None] * (self.colour(rgb) * shade[..., None] - self.image)

    def clouds(self, count: int, rgb: int, top: float, bottom: float, opacity: float) -> None:
        for _ in range(count):
            x, y, width = self.rng.uniform(0, 1), self.rng.uniform(top, bottom), self.rng.uniform(0.09, 0.16)
            mask = np.zeros_like(self.x)
            for puff in np.linspace(-1, 1, 5):
                radius = width * (0.62 - 0.32 * abs(puff)) * self.rng.uniform(0.85, 1.15)
                distance = np.hypot(self.x - x - puff * width, (self.y - y + 0.6 * radius) * 1.3)
                mask = np.maximum(mask, np.clip((radius - distance) / 0.03 + 0.5, 0, 1))
            self.fill(self.colour(rgb, 3.0), opacity * mask * (self.y < y + 0.02))

    def dots(self, count: int, rgb: int, top: float, bottom: float, radius: float, opacity: float) -> None:
        for _ in range(count):
            x, y = self.rng.uniform(0, 1), self.rng.uniform(top, bottom)
            self.disc(
                x, y, radius * self.rng.uniform(0.6, 1.3), rgb, 0.012, opacity * self.rng.uniform(0.5, 1)
            )


def _sunset(c: Canvas) -> None:
    horizon, x = c.rng.uniform(0.68, 0.78), c.rng.uniform(0.15, 0.85)
    c.gradient([(0.0, 0x4B2A6B), (0.35, 0xB0406F), (0.7, 0xF2793F), (1.0, 0xFFC65A)], 0.0, horizon + 0.05)
    y = horizon - c.rng.uniform(0.0, 0.10)
    c.glow(x, y, 0.22, 0xFFE08A, 0.8)
    c.disc(x, y, c.rng.uniform(0.09, 0.13), 0xFFF1B8, 0.02)
    c.ground(horizon + 0.04 * c.wave(3), 0x3C1F47, 0.5)


def _night(c: Canvas) -> None:
    c.gradient([(0.0, 0x070B24), (0.7, 0x17235A), (1.0, 0x2B3A7A)])
    c.dots(int(c.rng.integers(18, 34)), 0xFFFFFF, 0.0, 0.8, 0.008, 1.0)
    c.ground(c.rng.uniform(0.78, 0.86) + 0.05 * c.wave(3), 0x0A0F22, 0.3)


def _sea(c: Canvas) -> None:
    horizon = c.rng.uniform(0.38, 0.5)
    c.gradient([(0.0, 0x6FB7EE), (1.0, 0xD8F0FB)], 0.0, horizon)
    c.clouds(int(c.rng.integers(0, 3)), 0xFFFFFF, 0.08, horizon - 0.08, 0.9)
    c.gradient([(0.0, 0x2F8FCB), (1.0, 0x0B4C8F)], horizon, 1.0)
    for row in np.linspace(horizon + 0.05, 0.98, 7):
        near = (row - horizon) / (1 - horizon)
        line = row + (0.006 + 0.02 * near) * c.wave(3, 3.0, 9 - 4 * near)
        thickness = 0.004 + 0.014 * near
        crest = np.clip(1 - np.abs(c.y - line) / thickness, 0, 1) * (0.5 + 0.5 * c.wave(2, 2.0, 5.0))
        c.fill(c.colour(0xBFE6F7, 5.0), 0.65 * crest)


def _meadow(c: Canvas) -> None:
    horizon = c.rng.uniform(0.48, 0.6)
    c.gradient([(0.0, 0x7CC4F5), (1.0, 0xE3F5FC)], 0.0, 0.75)
    c.clouds(int(c.rng.integers(0, 3)), 0xFFFFFF, 0.1, horizon - 0.1, 0.9)
    c.ground(horizon + 0.06 * c.wave(2, 0.6, 1.6), 0x8CCB5A)
    c.ground(horizon + 0.12 + 0.05 * c.wave(2, 0.6, 1.8), 0x63B444, 0.25)
    flowers = int(c.rng.choice([0xFFFFFF, 0xFFE45C, 0xF59AC0]))
    c.dots(int(c.rng.integers(6, 16)), flowers, 0.75, 1.0, 0.012, 0.9)


def _snow(c: Canvas) -> None:
    horizon = c.rng.uniform(0.55, 0.66)
    c.gradient([(0.0, 0x9DB4CC), (1.0, 0xD5E2EC)], 0.0, 0.85)
    c.ground(horizon + 0.05 * c.wave(2, 0.6, 1.6), 0xE4EDF5)
    c.ground(horizon + 0.13 + 0.04 * c.wave(2, 0.6, 1.8), 0xFAFCFF, 0.08)
    c.dots(int(c.rng.integers(30, 50)), 0xFFFFFF, 0.0, 0.95, 0.014, 1.0)


def _desert(c: Canvas) -> None:
    horizon = c.rng.uniform(0.5, 0.6)
    c.gradient([(0.0, 0x79BDE8), (1.0, 0xFBE7C0)], 0.0, 0.7)
    c.ground(horizon + 0.07 * c.wave(2, 0.5, 1.4), 0xE9BE78)
    c.ground(horizon + 0.13 + 0.07 * c.wave(2, 0.5, 1.4), 0xDDA75A)
    c.ground(horizon + 0.27 + 0.05 * c.wave(2, 0.5, 1.4), 0xCF9146, 0.2)


def _forest(c: Canvas) -> None:
    c.gradient([(0.0, 0x9CC7A0), (1.0, 0xD5E8C8)], 0.0, 0.85)
    for rgb, foot, count in ((0x6FA37C, 0.62, 12), (0x3F7A55, 0.70, 9), (0x23573B, 0.78, 7)):
        for x in np.linspace(-0.05, 1.05, count) + c.rng.uniform(-0.04, 0.04, count):
            height, width = c.rng.uniform(0.38, 0.6), c.rng.uniform(0.07, 0.11)
            inside = width * (c.y - foot + height) / height - np.abs(c.x - x)
            c.fill(c.colour(rgb, 5.0), np.clip(inside * c.size + 0.5, 0, 1) * (c.y < foot + 0.02))
    c.ground(c.rng.uniform(0.66, 0.72) + 0.03 * c.wave(2), 0x3E6B35, 0.35)


def _sky(c: Canvas) -> None:
    c.gradient([(0.0, 0x3E97E8), (1.0, 0xA9DAFA)])
    c.clouds(int(c.rng.integers(4, 7)), 0xFFFFFF, 0.1, 1.0, 0.95)


def _city(c: Canvas) -> None:
    c.gradient([(0.0, 0x8FB3D9), (1.0, 0xF3DCC8)], 0.0, 0.85)
    street = c.rng.uniform(0.8, 0.85)
    for rgb, low, high in ((0x8C9BB3, 0.3, 0.6), (0x55627D, 0.2, 0.45)):
        x = -0.05
        while x < 1:
            width, roof = c.rng.uniform(0.11, 0.2), street - c.rng.uniform(low, high)
            block = (c.x > x) & (c.x < x + width) & (c.y > roof) & (c.y < street)
            c.fill(c.colour(rgb, 7.0), block.astype(np.float32))
            column, row = (c.x - x) / 0.06 % 1, (c.y - roof) / 0.08 % 1
            windows = block & (abs(column - 0.5) < 0.25) & (abs(row - 0.6) < 0.22) & (c.x < x + width - 0.01)
            c.fill(c.colour(0xFFE6A0, 5.0), 0.6 * windows)
            x += width + c.rng.uniform(0, 0.03)
    c.ground(street, 0x4A4D55, 0.2)
    dashes = (np.abs(c.y - street - 0.09) < 0.012) & (c.x * 5 % 1 < 0.55)
    c.fill(c.colour(0xF4F1E4, 3.0), dashes.astype(np.float32))


def _mountains(c: Canvas) -> None:
    c.gradient([(0.0, 0x5FA5DD), (1.0, 0xDCEBF5)], 0.0, 0.75)
    for rgb, foot, count in ((0x8493AE, 0.70, 4), (0x5B6B88, 0.74, 3)):
        for x in (np.arange(count) + c.rng.uniform(0.2, 0.8, count)) / count:
            height, slope = c.rng.uniform(0.32, 0.5), c.rng.uniform(1.2, 1.7)
            depth = c.y - (foot - height) - slope * np.abs(c.x - x)
            c.fill(c.colour(rgb, 6.0), np.clip(depth * c.size / slope + 0.5, 0, 1) * (c.y < foot + 0.05))
            cap = c.y - (foot - height) < 0.12 + 0.025 * c.wave(2, 5.0, 9.0)
            c.fill(c.colour(0xF7FAFF, 2.0), np.clip(depth * c.size / slope + 0.5, 0, 1) * cap)
    c.ground(c.rng.uniform(0.7, 0.75) + 0.03 * c.wave(2), 0x6C9A58, 0.3)


def _beach(c: Canvas) -> None:
    horizon, shore = c.rng.uniform(0.36, 0.42), c.rng.uniform(0.58, 0.66)
    c.gradient([(0.0, 0x55B4F0), (1.0, 0xCDEEFB)], 0.0, horizon)
    c.gradient([(0.0, 0x1F9CC4), (1.0, 0x6FDAD6)], horizon, shore + 0.1)
    line = shore + 0.03 * c.wave(2, 0.8, 2.0)
    c.ground(line - 0.018, 0xF5FFFF)
    c.ground(line + 0.012, 0xF2DCA4, 0.12)


def _underwater(c: Canvas) -> None:
    c.gradient([(0.0, 0x3CC8D8), (0.5, 0x1583B5), (1.0, 0x0A4A80)])
    for x in c.rng.uniform(0, 1, 4):
        lean = c.x - x - 0.35 * c.y
        c.fill(c.colour(0xBDF4F4, 3.0), 0.28 * np.exp(-((lean / 0.04) ** 2)) * np.clip(1 - c.y / 0.8, 0, 1))
    c.ground(0.86 + 0.03 * c.wave(2), 0xB9A877, 0.3)
    for _ in range(int(c.rng.integers(6, 12))):
        x, y, radius = c.rng.uniform(0, 1), c.rng.uniform(0, 0.85), c.rng.uniform(0.012, 0.028)
        c.disc(x, y, radius, 0xD6F7FA, 0.012, 0.75)
        c.disc(x, y, 0.55 * radius, 0x3FA5C8, 0.012, 0.6)


def _plain(rgb: int) -> Callable[[Canvas], None]:
    def paint_plain(c: Canvas) -> None:
        c.gradient([(0.0, rgb), (1.0, rgb)])
        c.image *= 1 - 0.12 * np.clip(c.y - 0.75, 0, 1)[..., None]
        c.glow(c.rng.uniform(0.3, 0.7), 0.4, 0.4, 0xFFFFFF, 0.18)

    return paint_plain


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "sunset": _sunset,
    "night": _night,
    "sea": _sea,
    "meadow": _meadow,
    "snow": _snow,
    "desert": _desert,
    "forest": _forest,
    "sky": _sky,
    "city": _city,
    "mountains": _mountains,
    "beach": _beach,
    "underwater": _underwater,
    "pink": _plain(0xF2A0BE),
    "yellow": _plain(0xF5D656),
    "blue": _plain(0x3F6FD8),
    "white": _plain(0xF4F4F2),
}
BACKGROUNDS: tuple[str, ...] = tuple(PAINTERS)


def paint(name: str, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """One random version of the background."""
    canvas = Canvas(SUPERSAMPLE * size, rng)
    PAINTERS[name](canvas)
    small = canvas.image.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE, 3).mean((1, 3))
    return np.clip(small + 0.5, 0, 255).astype(np.uint8)
