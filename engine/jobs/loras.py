"""LoRAs that rows of a job name for themselves, in place of the job's own: FILE or FILE=SCALE, several with
commas between them, as in the option.

They become part of the weights, so that rows that name the same are drawn together, and nothing is compiled
for them. Paths go from the folder of the rows' file on, as those of pictures do.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import NamedTuple

from engine.config import GenerateConfig, JobConfig
from engine.jobs import digests
from engine.jobs.given import HOPELESS
from engine.pipeline import Pipeline
from engine.text.row_files import SHOWN
from engine.text.row_paths import astray
from engine.text.rows import Row
from engine.types import Trouble, UserError
from engine.weights import lora_files, lycoris
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

    def look_ahead(self, rows: Iterable[Row], threads: Executor, check: Callable[[], None]) -> None:
        """Looks into what these rows name, some at once; `check` is called often, and may raise.

        Raises:
          UserError: trouble that may pass.
        """
        texts = {row.lora: None for row in rows if row.lora}
        for _ in threads.map(self._look, texts):
            check()

    def of(self, row: Row) -> Own | str | None:
        """The row's own, or why they cannot be used; None where it says nothing.

        Raises:
          UserError: trouble on the way to a file, which may pass.
        """
        return self._look(row.lora) if row.lora or (row.lora == "" and self._usual) else None

    def _look_at(self, text: str) -> Own | str:
        if text and "," in self._folder:
            return f"{self._folder} has a comma in its name, which parts LoRAs: rename it"
        try:
            files = tuple((self._found(path), scale) for path, scale in GenerateConfig(lora=text).loras())
            lycoris.read_all(files, self._parts)  # whether they fit the model
            told = (path if scale == 1 and "=" not in path else f"{path}={scale}" for path, scale in files)
            return Own(files, ",".join(told), digests.of_loras(files))
        except UserError as error:
            return str(error)
        except OSError as error:
            reason = f"{error.filename or text}: cannot be read: {error.strerror}"
            if error.errno in HOPELESS:
                return reason
            raise Trouble(f"{reason}; once that is mended, the same command goes on") from None

    def _found(self, own: str) -> str:
        """A path as it can be opened: of a file below the folder, see engine.text.row_paths."""
        if why := astray(own):
            raise UserError(f"lora={own[:SHOWN]!r} {why}")
        # No home, whatever the name begins with
        path = os.path.join(self._folder or ("." if own.startswith("~") else ""), os.path.normpath(own))
        found = os.path.relpath(lora_files.find(path), self._folder or ".")
        if why := astray(found, self._base):
            raise UserError(f"lora={own[:SHOWN]!r} {why}")
        return path
