"""A sheet of pictures with a text under each, in groups with headings."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from engine.finish import INK, PAPER, in_ascii

SIDE = 192  # px: the square that a picture fills in one direction
COLUMNS = 4
GAP = 12  # px, between cells and at the edge
TEXT, HEADING = 13, 20  # px, sizes of the letters
LEADING = 16  # px, from line to line of a text
MOST_LINES = 5  # of a text
NONE: Mapping[int, str] = MappingProxyType({})

Row = tuple[UInt8[np.ndarray, "_ _ 3"], str]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def sheet(rows: Sequence[Row], headings: Mapping[int, str] = NONE, columns: int = COLUMNS) -> Image.Image:
    """Pictures of any sizes in cells of one size, each with its text, in ASCII, wrapped under it.

    Args:
      rows: pictures, each with a text; one or more.
      headings: place of a row -> what stands above it and those that follow it. It begins a line of its own.

    Raises:
      ValueError: no row.
    """
    if not rows:
        raise ValueError("no picture for the sheet")
    font = ImageFont.load_default(TEXT)
    texts = [wrapped(text, font) for _, text in rows]
    pictures = [ImageOps.contain(Image.fromarray(picture), (SIDE, SIDE)) for picture, _ in rows]
    highest = max(picture.height for picture in pictures)
    cell = highest + 4 + LEADING * max(map(len, texts)) + GAP

    corners, top, column = [], GAP, 0
    titles = []
    for place in range(len(rows)):
        if place and (column == columns or place in headings):
            top, column = top + cell, 0
        if place in headings:
            titles.append((top, headings[place]))
            top += HEADING + GAP
        corners.append((GAP + column * (SIDE + GAP), top))
        column += 1

    page = Image.new("RGB", (GAP + columns * (SIDE + GAP), top + cell), PAPER)
    draw, large = ImageDraw.Draw(page), ImageFont.load_default(HEADING)
    for top, title in titles:
        draw.text((GAP, top), in_ascii(title), fill=INK, font=large)
    for (left, top), picture, lines in zip(corners, pictures, texts, strict=True):
        # In the middle of its cell, and standing on its text.
        page.paste(picture, (left + (SIDE - picture.width) // 2, top + highest - picture.height))
        for number, line in enumerate(lines):
            draw.text((left, top + highest + 4 + number * LEADING), line, fill=INK, font=font)
    return page


def wrapped(text: str, font: Font, width: int = SIDE, most: int = MOST_LINES) -> list[str]:
    """The text in ASCII, in at most `most` lines no wider than `width` px; three dots end one that is cut."""
    # No letter is narrower than half a pixel: of a text without end, no more is looked at.
    words = in_ascii(text[: 2 * width * most]).split()
    lines: list[str] = []
    for word in words:
        word = "".join(c for c in word if c.isprintable())
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:  # a word may be wider than a line
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines[most - 1 :] = [f"{last}..."]
    return lines
