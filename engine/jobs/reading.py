"""Pictures beside the words of rows, read a batch at a time, while the devices are at work on others."""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

from engine.jobs.given import OfRows, Paths
from engine.jobs.plan import Wanted
from engine.jobs.store import Store
from engine.parallel import Devices
from engine.requests import Given, Settings
from engine.types import UserError

ELSEWHERE = "another host could not read its picture; failures of the first host say why"


class Opened(NamedTuple):
    """A batch, without what could not be read."""

    wanted: list[Wanted]
    given: list[Given]  # of all that is wanted
    failures: list[dict[str, Any]]  # pictures that will not be drawn, and why


class Reader:
    """Reads each picture once for all that stand side by side and share it."""

    def __init__(self, pictures: OfRows, devices: Devices, store: Store):
        self._pictures, self._devices, self._store = pictures, devices, store
        self._last: dict[tuple, Given | str] = {}  # of the batch before

    def open(self, wanted: Sequence[Wanted], settings: Settings, threads: Executor) -> Opened:
        """The pictures of a batch, at the size that it is drawn at.

        Raises:
          UserError: trouble that does not pass within the patience of the store.
        """
        shape = settings.size
        keys = [(self._pictures.paths(one.row), *shape) for one in wanted]
        rows = dict(zip(keys, (one.row for one in wanted), strict=True))
        new = [key for key in rows if key not in self._last]
        read = dict(zip(new, threads.map(lambda key: self._read(rows[key], *key), new), strict=True))
        self._last = {key: self._last[key] if key in self._last else read[key] for key in rows}
        found = [self._last[key] for key in keys]
        if self._devices.any(any(isinstance(one, str) for one in found)):
            # Hosts that draw together leave out the same.
            found = [self._agreed(one) for one in found]
        sound = [(one, given) for one, given in zip(wanted, found, strict=True) if isinstance(given, Given)]
        failures = [
            {**one.address, "reason": why}
            for one, why in zip(wanted, found, strict=True)
            if isinstance(why, str)
        ]
        return Opened([one for one, _ in sound], [given for _, given in sound], failures)

    def _agreed(self, found: Given | str) -> Given | str:
        failed = self._devices.any(isinstance(found, str))
        return ELSEWHERE if failed and isinstance(found, Given) else found

    def _read(self, row: Any, paths: Paths, height: int, width: int) -> Given | str:
        def attempt() -> Given | str:
            try:
                return self._pictures.read(row, height, width)
            except UserError as error:
                return str(error)

        return self._store.patiently(attempt, paths.each[0])
