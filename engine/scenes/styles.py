"""Ways to draw: the same scene as a pencil sketch, in neon, as pixel art, in watercolour."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

Picture = UInt8[np.ndarray, "H W 3"]
Style = Callable[[Image.Image], Image.Image]


def _sketch(image: Image.Image) -> Image.Image:
    """Graphite on paper: a grey picture divided by its own blur, which leaves the edges."""
    grey = ImageOps.grayscale(image)
    soft = np.asarray(grey.filter(ImageFilter.GaussianBlur(max(image.width / 32, 1))), np.float32)
    lines = np.asarray(grey, np.float32) / np.maximum(soft, 1)
    dark = np.clip(1 - 3 * np.maximum(1 - lines, 0), 0.1, 1)[..., None]
    return Image.fromarray((dark * (244, 240, 230)).astype(np.uint8))


def _neon(image: Image.Image) -> Image.Image:
    """Glowing outlines in the night, in the colours of what they surround."""
    edges = ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES)
    edges.paste(0, (0, 0, image.width, 1))  # the filter leaves the frame as it was
    edges.paste(0, (0, image.height - 1, image.width, image.height))
    edges.paste(0, (0, 0, 1, image.height))
    edges.paste(0, (image.width - 1, 0, image.width, image.height))
    bright = ImageEnhance.Color(ImageOps.autocontrast(image)).enhance(3.0)
    lines = ImageChops.multiply(bright, ImageOps.autocontrast(edges, cutoff=(0, 2)).convert("RGB"))
    glow = lines.filter(ImageFilter.GaussianBlur(max(image.width / 40, 1)))
    return ImageChops.add(ImageChops.add(lines, lines), ImageChops.add(glow, glow))


def _pixels(image: Image.Image) -> Image.Image:
    """Large squares of few colours."""
    small = image.resize((max(image.width // 4, 1), max(image.height // 4, 1)), Image.Resampling.BOX)
    few = small.quantize(12, dither=Image.Dither.NONE).convert("RGB")
    return few.resize(image.size, Image.Resampling.NEAREST)


def _watercolour(image: Image.Image) -> Image.Image:
    """Pale patches that have run into each other, on white paper."""
    radius = max(image.width // 64, 1)
    patches = image.filter(ImageFilter.MedianFilter(2 * radius + 3)).filter(ImageFilter.SMOOTH)
    pale = np.asarray(ImageEnhance.Color(patches).enhance(1.3), np.float32)
    return Image.fromarray((255 - 0.62 * (255 - pale)).astype(np.uint8))


STYLES: dict[str, Style] = {
    "pencil sketch": _sketch,
    "neon": _neon,
    "pixel art": _pixels,
    "watercolour": _watercolour,
}


def restyle(image: Picture, style: str) -> Picture:
    """The picture in a style of STYLES."""
    return np.asarray(STYLES[style](Image.fromarray(image)))
