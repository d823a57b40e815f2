"""The sprites of all things in one picture file, so that a machine without the font can draw.

Made from the Noto colour emoji font (OFL 1.1): `python -m engine.world.atlas` writes it anew.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, UnidentifiedImageError

from engine.emoji import font, font_path
from engine.errors import UserError
from engine.world.scene import Thing

FILE = pathlib.Path(__file__).parent.parent / "assets" / "world-atlas.webp"
SIDE = 96  # pixels of a sprite's cell; a big thing covers about 80 of a picture's 128
MARGIN = 2  # transparent pixels around a sprite in its cell
ACROSS = 16  # cells in a row of the file
FORMAT = 1  # of the file; part of the digest


@dataclasses.dataclass(frozen=True, eq=False)
class Atlas:
    """Sprites and what a layout needs to know of their shapes, in the order of `things`.

    Attributes:
      things: whose sprites these are.
      pixels: premultiplied RGBA; each sprite is centred in its cell and fills it one way.
      extent: width and height of what is drawn, as fractions of the cell.
      top, bottom: for each column of the cell the first and last opaque row, as fractions of the cell;
        1 and 0 where the column is empty. Where things touch.
    """

    things: tuple[Thing, ...]
    pixels: UInt8[np.ndarray, "N S S 4"]
    extent: Float[np.ndarray, "N 2"]
    top: Float[np.ndarray, "N S"]
    bottom: Float[np.ndarray, "N S"]

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Name -> number of the sprite."""
        return {thing.name: i for i, thing in enumerate(self.things)}


def digest(things: Sequence[Thing]) -> str:
    """A stable name of what the sprites depend on: the characters, in order, and how they are turned."""
    drawn = [FORMAT, SIDE, [(thing.emoji, thing.turn) for thing in things]]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def from_pixels(things: Sequence[Thing], pixels: UInt8[np.ndarray, "N S S 4"]) -> Atlas:
    """The atlas of sprites that are already drawn, one for each thing."""
    opaque = pixels[..., 3] > 127
    side = pixels.shape[1]
    filled = opaque.any(1)
    top = np.where(filled, opaque.argmax(1) / side, 1.0)
    bottom = np.where(filled, 1 - opaque[:, ::-1].argmax(1) / side, 0.0)
    seen = pixels[..., 3] > 16
    extent = np.stack([seen.any(1).sum(-1), seen.any(2).sum(-1)], -1) / side
    return Atlas(tuple(things), pixels, extent, top, bottom)


def build(things: Sequence[Thing]) -> Atlas:
    """Draws every thing with the font.

    Raises:
      UserError: there is no font, or it lacks a thing's picture.
    """
    return from_pixels(things, np.stack([_cell(_bitmap(thing)) for thing in things]))


def save(atlas: Atlas, path: pathlib.Path = FILE) -> None:
    """Writes one lossless WebP: a grid of premultiplied cells, the digest of the things in its XMP field."""
    n, side = atlas.pixels.shape[:2]
    rows = -(-n // ACROSS)
    cells = np.zeros((rows * ACROSS, side, side, 4), np.uint8)
    cells[:n] = atlas.pixels
    grid = cells.reshape(rows, ACROSS, side, side, 4).swapaxes(1, 2).reshape(rows * side, ACROSS * side, 4)
    data = io.BytesIO()
    # exact: colours are premultiplied, so that "invisible" ones are not for the encoder to change
    Image.fromarray(grid).save(
        data, "WEBP", lossless=True, exact=True, quality=100, method=6, xmp=digest(atlas.things).encode()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data.getvalue())
    partial.replace(path)


def load(things: Sequence[Thing], path: pathlib.Path = FILE) -> Atlas:
    """Reads what `save` wrote.

    Raises:
      UserError: the file is missing, is no atlas, or holds the sprites of another list of things.
    """
    command = "write it anew: python -m engine.world.atlas"
    try:
        with Image.open(path, formats=["WEBP"]) as image:
            found = image.info.get("xmp", b"").decode(errors="replace")
            if found != digest(things):
                raise UserError(
                    f"{path} holds other things ({found or 'nameless'}, not {digest(things)}): {command}"
                )
            grid = np.asarray(image.convert("RGBA"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}: {command}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): {command}") from None
    cells = grid.reshape(-1, SIDE, ACROSS, SIDE, 4).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 4)
    return from_pixels(things, np.ascontiguousarray(cells[: len(things)]))


def _bitmap(thing: Thing) -> Image.Image:
    """The font's own bitmap, turned, cropped to what is drawn; premultiplied, so that no fringe appears."""
    canvas = Image.new("RGBA", (384, 192))
    ImageDraw.Draw(canvas).text((24, 24), thing.emoji, font=font(font_path()), embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > 150:  # wider: the parts of a sequence that the font does not join
        raise UserError(
            f"{font_path()} has no picture of {thing.emoji} ({thing.name}): use NotoColorEmoji.ttf"
        )
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    turned = canvas.convert("RGBa").rotate(thing.turn, Image.Resampling.BICUBIC, center=middle)
    return turned.crop(turned.getchannel("a").point(lambda a: 255 * (a > 16)).getbbox())


def _cell(bitmap: Image.Image) -> UInt8[np.ndarray, "S S 4"]:
    """The bitmap as large as the cell allows, in its middle."""
    scale = (SIDE - 2 * MARGIN) / max(bitmap.size)
    size = tuple(max(1, round(length * scale)) for length in bitmap.size)
    pixels = np.asarray(bitmap.resize(size, Image.Resampling.LANCZOS, reducing_gap=None))
    cell = np.zeros((SIDE, SIDE, 4), np.uint8)
    x, y = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    cell[y : y + size[1], x : x + size[0]] = pixels
    cell[..., :3] = np.minimum(cell[..., :3], cell[..., 3:])  # Lanczos overshoots
    return cell


def main() -> None:
    """Writes the atlas of THINGS to its place among the assets."""
    from engine.world.things import THINGS

    save(build(THINGS))
    print(f"{FILE}: {len(THINGS)} things, {FILE.stat().st_size / 2**20:.2f} MiB, digest {digest(THINGS)}")


if __name__ == "__main__":
    main()
