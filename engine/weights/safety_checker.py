"""A safety checker: a folder of its own, or in that of a model."""

import os
from pathlib import Path

from engine.types import UserError
from engine.weights.component import Component, Place, load_component, read_config

KIND = "safety_checker"


def find(path: str | Path) -> Path:
    """The folder of a safety checker, which may lie in `path`; UserError where there is none."""
    folder = Path(os.path.expanduser(path))
    for there in (folder / KIND, folder):
        if (there / "config.json").is_file():
            return there
    raise UserError(
        f"no safety checker in {path}: write its folder, with config.json and safetensors, or that of a "
        f"model with {KIND}/ in it, as Stable Diffusion 1 has it"
    )


def look(path: str | Path) -> Path:
    """The same; UserError also where its config is another's."""
    read_config(find(path) / "config.json", KIND)
    return find(path)


def load_safety_checker(path: str | Path, place: Place | None = None) -> Component:
    """Reads one, in float32; `place` as in `load_component`.

    Raises:
      UserError: there is none, or it is broken.
    """
    return load_component(find(path), KIND, place=place)
