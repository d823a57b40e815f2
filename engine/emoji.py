"""The Noto colour emoji font (OFL 1.1), which the system or the user provides."""

import functools
import os
import pathlib

from PIL import ImageFont

from engine.errors import UserError

FONT_VARIABLE = "FOGSCULPT_EMOJI_FONT"
FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-emoji-color-fonts/NotoColorEmoji.ttf",  # older Fedora
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/Library/Fonts/NotoColorEmoji.ttf",
    "/Library/Fonts/NotoColorEmoji.ttf",
)
BITMAP_SIZE = 109  # the one size at which the font holds bitmaps


def font_path() -> pathlib.Path:
    """The colour emoji font: $FOGSCULPT_EMOJI_FONT, else where systems keep it.

    Raises:
      UserError: there is none.
    """
    named = os.environ.get(FONT_VARIABLE)
    for place in [named] if named else FONT_PLACES:
        path = pathlib.Path(place).expanduser()
        if path.is_file():
            return path
    raise UserError(
        f"no colour emoji font at {named or 'any of the usual places'}: install it"
        f" (Debian: apt install fonts-noto-color-emoji) or set {FONT_VARIABLE} to NotoColorEmoji.ttf"
    )


@functools.cache
def font(path: pathlib.Path) -> ImageFont.FreeTypeFont:
    """The font of a file; UserError where it is none."""
    try:
        return ImageFont.truetype(str(path), BITMAP_SIZE)
    except OSError as error:
        raise UserError(f"{path} is not a colour emoji font ({error}): use NotoColorEmoji.ttf") from None
