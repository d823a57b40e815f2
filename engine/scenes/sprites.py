"""Sprites from the colour emoji font."""

import dataclasses
import functools

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image, ImageDraw

from engine.emoji import font, font_path
from engine.errors import UserError
from engine.scenes.things import THINGS


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A sprite, ready to be composed: out = premultiplied + backdrop * inverse_alpha / 255.

    `top` and `bottom` are, for each column, the first and last opaque row (`height` and -1 where the
    column has none); they are where things touch.
    """

    premultiplied: UInt8[np.ndarray, "H W 3"]
    inverse_alpha: UInt16[np.ndarray, "H W 1"]
    top: np.ndarray
    bottom: np.ndarray

    @property
    def height(self) -> int:
        return self.premultiplied.shape[0]

    @property
    def width(self) -> int:
        return self.premultiplied.shape[1]


@functools.cache
def _bitmap(thing: int) -> Image.Image:
    """The font's own bitmap, cropped to what is drawn, premultiplied so that resizing has no fringe."""
    canvas = Image.new("RGBA", (192, 192))
    ImageDraw.Draw(canvas).text((24, 24), THINGS[thing].emoji, font=font(font_path()), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise UserError(
            f"{font_path()} has no picture of {THINGS[thing].emoji} ({THINGS[thing].name}):"
            " use NotoColorEmoji.ttf"
        )
    turned = canvas.convert("RGBa").rotate(THINGS[thing].turn, Image.Resampling.BICUBIC)
    return turned.crop(turned.getchannel("a").point(lambda a: 255 * (a > 16)).getbbox())


@functools.lru_cache(maxsize=8192)
def sprite(thing: int, side: int, flipped: bool) -> Sprite:
    """The thing as seen at `side` pixels.

    `side` is the geometric mean of width and height, held between 0.8 and 1 of the longer one, so that a
    flat skateboard and a tall penguin look about as large as a round ball.
    """
    bitmap = _bitmap(thing)
    longer, mean = max(bitmap.size), (bitmap.width * bitmap.height) ** 0.5
    scale = side / max(mean, 0.8 * longer)
    size = (max(1, round(bitmap.width * scale)), max(1, round(bitmap.height * scale)))
    small = bitmap.resize(size, Image.Resampling.BOX if scale < 0.25 else Image.Resampling.LANCZOS)
    pixels = np.asarray(small)[:, ::-1] if flipped else np.asarray(small)
    alpha = pixels[..., 3:]
    opaque = alpha[..., 0] > 127
    height, filled = len(opaque), opaque.any(0)
    return Sprite(
        premultiplied=np.minimum(pixels[..., :3], alpha),
        inverse_alpha=255 - alpha.astype(np.uint16),
        top=np.where(filled, opaque.argmax(0), height),
        bottom=np.where(filled, height - 1 - opaque[::-1].argmax(0), -1),
    )


def paste(image: UInt8[np.ndarray, "H W 3"], piece: Sprite, x: int, y: int) -> None:
    """Composes `piece` over `image` in place, its top left corner at (x, y); what lies outside is cut."""
    height, width = image.shape[:2]
    left, right, upper, lower = (
        max(x, 0),
        min(x + piece.width, width),
        max(y, 0),
        min(y + piece.height, height),
    )
    if left >= right or upper >= lower:
        return
    view = image[upper:lower, left:right]
    cut = np.s_[upper - y : lower - y, left - x : right - x]
    view[...] = piece.premultiplied[cut] + (view * piece.inverse_alpha[cut] + 127) // 255
