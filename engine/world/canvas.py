"""The brushes that the backgrounds of the drawn world are painted with, in numpy.

Lengths are fractions of the picture, y runs down; colours are 0xRRGGBB.
"""

import numpy as np


class Canvas:
    """A square float picture that knows which of it is sky, and which of it shines at night.

    Attributes:
      image: (S, S, 3), 0..255.
      sky, light: (S, S), 0..1: what night, sunset and rain repaint, and what is lit at night.
    """

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng = size, rng
        self.x, self.y = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size] * 2)
        self.image = np.zeros((size, size, 3), np.float32)
        self.sky = np.zeros((size, size), np.float32)
        self.light = np.zeros((size, size), np.float32)

    def colour(self, rgb: int, spread: float = 6.0) -> np.ndarray:
        """The colour, moved a little at random: lightness together, channels less."""
        channels = np.array([rgb >> 16, rgb >> 8 & 255, rgb & 255], np.float32)
        moved = channels + self.rng.normal(0, spread) + self.rng.normal(0, spread / 2, 3)
        return np.clip(moved, 0, 255).astype(np.float32)

    def fill(self, rgb: int, mask: np.ndarray, spread: float = 6.0, light: float = 0.0) -> None:
        """Blends the colour in by the mask (S, S), 0..1; `light` of it shines at night."""
        mask = np.asarray(mask, np.float32)
        self.image += mask[..., None] * (self.colour(rgb, spread) - self.image)
        self.sky *= 1 - mask
        self.light += mask * (light - self.light)

    def gradient(
        self, stops: list[tuple[float, int]], top: float = 0.0, bottom: float = 1.0, sky: float = 0.0
    ) -> None:
        """Colours from `top` to `bottom`, at heights 0..1 between them; all above and below is kept."""
        heights = [top + at * (bottom - top) for at, _ in stops]
        colours = np.array([self.colour(c) for _, c in stops])
        column = self.y[:, 0]
        rows = np.stack([np.interp(column, heights, channel) for channel in colours.T], -1)
        inside = (column >= top) & (column <= bottom)
        self.image[inside] = rows[inside, None]
        self.sky[inside], self.light[inside] = sky, 0

    def soft(self, inside: np.ndarray, soft: float | None = None) -> np.ndarray:
        """A mask of where `inside` (a signed distance) is positive, `soft` or one pixel wide at its edge."""
        return np.clip(inside / (soft or 1 / self.size) + 0.5, 0, 1)

    def disc(self, x: float, y: float, radius: float, rgb: int, soft=0.01, opacity=1.0, light=0.0) -> None:
        self.oval(x, y, radius, radius, rgb, soft, opacity, light)

    def oval(
        self, x: float, y: float, rx: float, ry: float, rgb: int, soft=0.01, opacity=1.0, light=0.0
    ) -> None:
        distance = (1 - np.hypot((self.x - x) / rx, (self.y - y) / ry)) * min(rx, ry)
        self.fill(rgb, opacity * self.soft(distance, soft), 4.0, light)

    def box(self, x0: float, y0: float, x1: float, y1: float, rgb: int, spread=4.0, light=0.0) -> None:
        inside = np.minimum(np.minimum(self.x - x0, x1 - self.x), np.minimum(self.y - y0, y1 - self.y))
        self.fill(rgb, self.soft(inside), spread, light)

    def triangle(self, x: float, top: float, foot: float, half: float, rgb: int, spread=5.0) -> None:
        """Its tip at (x, top), its base 2 * half wide at y = foot."""
        inside = half * (self.y - top) / (foot - top) - np.abs(self.x - x)
        self.fill(rgb, self.soft(inside) * (self.y < foot), spread)

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float, rgb: int, opacity=1.0) -> None:
        """A straight stroke with round ends."""
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        distance = np.hypot(self.x - x0 - along * dx, self.y - y0 - along * dy)
        self.fill(rgb, opacity * self.soft(width / 2 - distance), 4.0)

    def glow(self, x: float, y: float, radius: float, rgb: int, opacity: float) -> None:
        square = (self.x - x) ** 2 + (self.y - y) ** 2
        sky = self.sky  # light in the air hides no sky
        self.fill(rgb, opacity * np.exp(-square / (2 * radius**2)), 4.0)
        self.sky = sky

    def wave(self, waves: int, low: float = 1.0, high: float = 4.0) -> np.ndarray:
        """A smooth random line (S,), about -1..1, of so many sines of `low` to `high` periods."""
        periods, phases = self.rng.uniform(low, high, waves), self.rng.uniform(0, 2 * np.pi, waves)
        lines = np.sin(2 * np.pi * periods[:, None] * self.x[0] + phases[:, None]) / periods[:, None]
        return (lines.sum(0) / np.abs(1 / periods).sum()).astype(np.float32)

    def ground(self, height: float | np.ndarray, rgb: int, darker: float = 0.0) -> None:
        """Everything below the line `height` (a number or (S,)); darkens by that share to the foot."""
        line = np.broadcast_to(height, self.x[0].shape)
        mask = self.soft(self.y - line)
        shade = 1 - darker * np.clip((self.y - line) / max(1 - float(line.min()), 1e-3), 0, 1)
        self.fill(rgb, mask)
        self.image *= 1 - mask[..., None] * (1 - shade[..., None])

    def clouds(self, count: int, rgb: int, top: float, bottom: float, opacity: float) -> None:
        for _ in range(count):
            x, y, width = self.rng.uniform(0, 1), self.rng.uniform(top, bottom), self.rng.uniform(0.09, 0.16)
            mask = np.zeros_like(self.x)
            for puff in np.linspace(-1, 1, 5):
                radius = width * (0.62 - 0.32 * abs(puff)) * self.rng.uniform(0.85, 1.15)
                distance = np.hypot(self.x - x - puff * width, (self.y - y + 0.6 * radius) * 1.3)
                mask = np.maximum(mask, np.clip((radius - distance) / 0.03 + 0.5, 0, 1))
            self.fill(rgb, opacity * mask * (self.y < y + 0.02), 3.0)

    def dots(self, count: int, rgb: int, top: float, bottom: float, radius: float, opacity: float) -> None:
        """Small discs of about that radius, strewn."""
        for _ in range(count):
            x, y = self.rng.uniform(0, 1), self.rng.uniform(top, bottom)
            share = opacity * self.rng.uniform(0.5, 1)
            self.disc(x, y, radius * self.rng.uniform(0.6, 1.3), rgb, 0.012, share)

    def noise(self, cells: int) -> np.ndarray:
        """Smooth random patches (S, S), 0..1, about `cells` across."""
        grid = self.rng.random((cells + 2, cells + 2)).astype(np.float32)
        at = np.arange(self.size, dtype=np.float32) / self.size * cells
        low, part = at.astype(int), at % 1
        part = part * part * (3 - 2 * part)
        rows = grid[low] * (1 - part[:, None]) + grid[low + 1] * part[:, None]
        return rows[:, low] * (1 - part) + rows[:, low + 1] * part
