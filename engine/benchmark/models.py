"""The models that are measured: of random weights, or a folder."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from engine.weights.random_folder import ARCHITECTURES, random_folder


@contextlib.contextmanager
def folder_of(name: str) -> Iterator[pathlib.Path | None]:
    """The folder of a model, for a while if the name is that of an architecture; None: the shipped one."""
    if name == "shipped":
        yield None
    elif name in ARCHITECTURES:
        with tempfile.TemporaryDirectory(prefix="fogsculpt-") as work:
            folder = pathlib.Path(work) / name
            random_folder(folder, name)
            yield folder
    else:
        yield pathlib.Path(name)
