"""LoRAs that rows of a job name for themselves, in place of the job's own: FILE or FILE=SCALE, several with
commas between them, as in the option.

They become part of the weights, so that rows that name the same are drawn together, and nothing is compiled
for them. Paths go from the folder of the rows' file on, as those of pictures do.
"""

import functools
import os
from typing import NamedTuple

from engine.config import GenerateConfig, JobConfig
from engine.jobs import digests
from engine.pipeline import Pipeline
from engine.text.row_files import SHOWN
from engine.text.row_paths import astray
from engine.text.rows import Row
from engine.types import Trouble, UserError
from engine.weights import lycoris
from engine.weights.lora import XL_KINDS

REMEMBERED = 4096  # rows' texts


class Own(NamedTuple):
    """Those of a row."""

    files: tuple[tuple[str, float], ...]  # and their scales; none: the row wants none
    told: str  # the same, as the option says it, and as pictures remember it
    mark: str  # files of other contents have another


class LorasOfRows:
    """What rows of a job say of LoRAs. Each text is looked into once: its files are read. Threads may ask."""

    def __init__(self, config: JobConfig, pipe: Pipeline):
        self._folder, self._usual = config.rows_folder, config.lora
        self._base = os.path.realpath(self._folder)
        self._parts = {kind: part.config for kind, part in pipe.model.parts.items() if kind in XL_KINDS}
        self._look = functools.lru_cache(REMEMBERED)(self._look_at)

    def of(self, row: Row) -> Own | str | None:
        """The row's own, or why they cannot be used; None where it says nothing.

        Raises:
          UserError: trouble on the way to a file, which may pass.
        """
        return self._look(row.lora) if row.lora or (row.lora == "" and self._usual) else None

    def _look_at(self, text: str) -> Own | str:
        try:
            files = GenerateConfig(lora=text).loras()
            for path, _ in files:
                if why := astray(path, self._base):
                    return f"lora={path[:SHOWN]!r} {why}"
            found = tuple((os.path.join(self._folder, path), scale) for path, scale in files)
            lycoris.read_all(found, self._parts)  # whether they fit the model
            told = ",".join(path if scale == 1 else f"{path}={scale}" for path, scale in found)
            return Own(found, told, digests.of_loras(found))
        except UserError as error:
            return str(error)
        except OSError as error:
            again = "once that is mended, the same command goes on"
            raise Trouble(f"{error.filename or text}: cannot be read: {error.strerror}; {again}") from None
