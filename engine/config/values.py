"""What the values of options mean that are more than a number or a path."""

import math
import re

from engine.config.reader import nearest
from engine.errors import UserError

MAX_TOLD = 65536  # pixels of a side that SDXL is told

# What pictures a ControlNet union sees, and the numbers that github.com/xinsir6/ControlNetPlus gave them
CONTROL_MODES = {
    **{"openpose": 0, "depth": 1, "hed": 2, "scribble": 2, "canny": 3, "lineart": 3, "mlsd": 3},
    **{"normal": 4, "segment": 5, "tile": 6, "inpaint": 7},
}


def scaled(
    name: str, value: str, what: str, example: str, usual: float = 1.0
) -> tuple[tuple[str, float], ...]:
    """The paths that an option names, each with its scale; UserError where it is no such list.

    Args:
      value: PATH or PATH=SCALE, several with commas between them.
      what: a path is called in the message.
      usual: the scale of a path that is named without one.
    """
    found = []
    for entry in value.split(",") if value else ():
        path, equals, number = entry.strip().rpartition("=")
        if not equals:
            path, number = number, str(usual)
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not path or not math.isfinite(scale):
            raise UserError(
                f"{name}={value!r}: write {what} or {what}=SCALE, with commas between several, "
                f"such as {example}"
            )
        found.append((path, scale))
    return tuple(found)


def control_mode(mode: str | int) -> int:
    """The number of a kind of picture; UserError for a name that is none of CONTROL_MODES."""
    if mode in CONTROL_MODES:
        return CONTROL_MODES[mode]
    if isinstance(mode, int) or mode.isdecimal():
        return int(mode)
    near = nearest(mode, CONTROL_MODES)
    raise UserError(f"control_mode={mode!r} is unknown{near}; write {', '.join(CONTROL_MODES)}, or a number")


def told_size(name: str, value: object) -> tuple[int, int]:
    """Height and width of WIDTHxHEIGHT, or top and left of LEFT,TOP; UserError where an option is neither."""
    form, least = (r"(\d{1,5}),(\d{1,5})", 0) if name == "crop_from" else (r"(\d{1,5})x(\d{1,5})", 1)
    found = re.fullmatch(form, value) if isinstance(value, str) else None
    sides = [int(side) for side in found.groups()] if found else []
    if not found or not all(least <= side <= MAX_TOLD for side in sides):
        write = "LEFT,TOP in pixels, such as 0,128" if not least else "WIDTHxHEIGHT, such as 1024x768"
        raise UserError(f"{name}={value!r}: write {write}; up to {MAX_TOLD}")
    return sides[1], sides[0]
