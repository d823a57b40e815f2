"""From the bytes of a picture to pixels of the wanted shape, whatever the picture is.

8-bit RGB in the way that it is meant to be seen: turned as its EXIF says, what is transparent on white, 16
bits rounded to 8; of an animation the first frame. Colour profiles are not applied.
"""

import io
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**26  # 8192 x 8192: 200 MB when decoded
ORIENTATION = 0x0112  # in EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
EXTRA_PIXELS = 2.0  # JPEGs are decoded smaller, down to that many times the size wanted


class Unusable(Exception):
    """A picture that cannot be used, and why, in a few words."""


class Crop(NamedTuple):
    """What part of a picture is taken where it sticks out of its shape, and whether it is mirrored."""

    across: float = 0.5  # 0: the left end, 1: the right end
    down: float = 0.5
    flip: bool = False


class Header(NamedTuple):
    width: int  # as seen
    height: int
    settings: Any  # of `engine.finish`, as text, if it has some


def read_header(file: io.BufferedIOBase, settings_key: str) -> Header:
    """Without a look at the pixels. Raises Unusable for no picture, and for too large ones."""
    image = _open(file)
    width, height = image.size
    if _orientation(image) in SIDEWAYS:
        width, height = height, width
    return Header(width, height, image.info.get(settings_key))


def read_pixels(
    file: io.BufferedIOBase, width: int, height: int, crop: Crop, alpha: bool = True
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture, scaled to fill width x height and cropped, never stretched.

    Args:
      alpha: what is transparent is white; False: it has the colour that it would have if it were not.

    Raises:
      Unusable: it is damaged or too large.
    """
    image = _open(file)
    turn = _orientation(image)
    sideways = turn in SIDEWAYS
    try:
        scale = max(width / image.size[sideways], height / image.size[not sideways])
        image.draft(None, tuple(max(1, int(side * scale * EXTRA_PIXELS)) for side in image.size))
        image.load()
        if turn in TURNS:
            image = image.transpose(TURNS[turn])
        image = _rgb(image, alpha)
        box = crop_box(*image.size, width, height, crop)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    except Exception as error:  # Pillow raises half a dozen types for broken files
        raise Unusable(_why(error)) from None
    return pixels[:, ::-1].copy() if crop.flip else pixels


def crop_box(
    width: int, height: int, new_width: int, new_height: int, crop: Crop
) -> tuple[float, float, float, float]:
    """left, top, right, bottom of the largest part in the new aspect ratio; fractions of pixels count."""
    across = min(float(width), height * new_width / new_height)
    down = min(float(height), width * new_height / new_width)
    left, top = crop.across * (width - across), crop.down * (height - down)
    return left, top, min(left + across, width), min(top + down, height)


def sizes(width: int, height: int, new_width: int, new_height: int, crop: Crop) -> Int32[np.ndarray, "6"]:
    """What SDXL is told of a cropped picture (Podell et al. 2023, section 2.2), as seen: height and width
    before it was scaled; how much of its top and left, when it was scaled, is not seen; its new height and
    width. Of a mirrored picture, what the crop took of the left is what was on the right.
    """
    scale = max(new_width / width, new_height / height)
    across, down = width * scale - new_width, height * scale - new_height
    left = (1 - crop.across if crop.flip else crop.across) * across
    return np.array([height, width, round(crop.down * down), round(left), new_height, new_width], np.int32)


def _open(file: io.BufferedIOBase) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise Unusable(f"damaged, or none of {', '.join(FORMATS)}") from None
    except Exception as error:
        raise Unusable(_why(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unusable(f"{width} x {height} pixels: too large")
    return image


def _why(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    return f"damaged: {' '.join(str(error).split())[:80] or type(error).__name__}"


def _orientation(image: Image.Image) -> int:
    try:
        # The PNG reader's own method would decode the whole picture in search of it.
        return Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # EXIF comes in all states; the pixels may be sound
        return 1


def _rgb(image: Image.Image, alpha: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data and alpha:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    return image.convert("RGB")
