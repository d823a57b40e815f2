"""Paths that stand in rows, from the folder of their file on: they name what lies in it, and nothing else.

Such files are often someone else's, and what they name is read and may be seen in what is made of it. So
neither an absolute path, nor `..`, nor a link leads out of the folder.
"""

import os
import pathlib


def astray(name: str, base: str | None = None) -> str:
    """Why the path in a row is none of a file below its folder; '' if it is.

    Args:
      base: the folder, a real path (without links); None: links are not looked at, nor anything on the disk.
    """
    if "\0" in name:
        return "is no path"
    if "://" in name:
        return "is no file of this machine; download it, and write a path from the folder on"
    if os.path.isabs(name) or pathlib.PureWindowsPath(name).drive:
        return "is an absolute path; write one from the folder on"
    out = "leads out of the folder"
    if base is None:
        return out if os.path.normpath(name).split(os.sep)[0] == os.pardir else ""
    try:
        real = os.path.realpath(os.path.join(base, name))
        return "" if os.path.commonpath([real, base]) == base else out
    except (ValueError, OSError):
        return "is no path"
