"""Where a job writes: a folder of this machine, or s3://BUCKET/FOLDER, gs://BUCKET/FOLDER.

Files appear whole or not at all, `create` has one winner however many try, and what fails is tried again for
as long as `patience` says: a full disk that somebody clears, a network that comes back. Then it is a
UserError, and nothing half-written is in anybody's way.

On a disk a file is written to the scratch folder, flushed, and moved or linked to its place. An object store
makes every object whole by itself; `create` there is a conditional PUT.
"""

import errno
import functools
import logging
import os
import pathlib
import secrets
import time
import types
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import tenacity

from engine import finish
from engine.jobs.places import Disk, Files, Objects
from engine.types import Trouble, UserError

T = TypeVar("T")

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # scheme -> the package that speaks it
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0  # seconds between tries
SHORTEST_TIMEOUT, LONGEST_TIMEOUT = 5.0, 60.0  # seconds without an answer that end a try
TRIES = 4  # that fit into patience where none is answered

WRITTEN, READ = "written", "read"
# Names that are wrong, and rights that are missing: when a job begins, nobody waits for them.
HOPELESS = (PermissionError, FileNotFoundError, NotADirectoryError)
# With these another folder helps; with all others, such as networks that fail, time does.
OF_THE_FOLDER = (*HOPELESS, FileExistsError, IsADirectoryError)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG)


class Store:
    """The output folder of a job, with patience."""

    def __init__(
        self,
        url: str,
        files: Files,
        patience: float,
        tell: Callable[[str], None],
        pause: Callable[[float], None],
    ):
        self.url, self._files = url, files
        self._patience, self._tell, self._pause = patience, tell, pause

    def read(self, path: str) -> bytes:
        """A whole file; FileNotFoundError where there is none."""
        return self._try(lambda: self._files.read(path), self._full(path), READ, FileNotFoundError)

    def open(self, path: str) -> BinaryIO:
        """A file of this machine (it has a `name`) to read from; FileNotFoundError where there is none."""
        return self._try(lambda: self._files.open(path), self._full(path), READ, FileNotFoundError)

    def names(self, path: str) -> list[str]:
        """What lies in a folder, sorted; nothing where there is no such folder."""
        return self._try(lambda: sorted(self._files.names(path)), self._full(path), READ)

    def times(self, path: str) -> dict[str, float]:
        """Name -> when it was written, seconds since 1970 by the place's clock, of the files of a folder."""
        return self._try(lambda: self._files.times(path), self._full(path), READ)

    def write(self, path: str, data: bytes) -> None:
        """Writes a file, in place of one that may be there."""
        self._try(lambda: self._files.write(path, data), self._full(path))

    def write_once(self, path: str, data: bytes) -> None:
        """The same without patience: OSError at the first failure. For what comes again soon."""
        self._files.write(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Writes a file where none is. Of many who try, one succeeds.

        Returns:
          Whether the file is there now with these bytes: so a try whose answer was lost is no failure.
        """
        return self._try(lambda: self._files.create(path, data), self._full(path))

    def publish(self, local: pathlib.Path, path: str) -> None:
        """Moves a file, or a folder of files, from the scratch folder to its place."""
        self._try(lambda: self._files.publish(local, path), self._full(path))

    def delete(self, path: str) -> None:
        """Removes a file, if it is there."""
        self._try(lambda: self._files.delete(path), self._full(path))

    def spool(self) -> pathlib.Path:
        """This process's scratch folder, from which `publish` moves things. It goes with the store."""
        return self.patiently(self._files.scratch)

    def patiently(self, attempt: Callable[[], T], read: str = "") -> T:
        """Runs something that writes into the scratch folder until it succeeds or patience ends.

        Args:
          read: what it reads, where it reads something that lies elsewhere.
        """
        if read:
            return self._try(attempt, read, READ, of=read)
        return self._try(attempt, self._files.scratch_name)

    def prepare(self, writable: bool) -> None:
        """Makes the folder, and proves that it can be written. What is forbidden is not tried again."""
        verb = WRITTEN if writable else READ
        try:
            self._try(lambda: self._files.prepare(writable), self.url, verb, *HOPELESS)
            if writable:
                self._try(self._prove, self.url, verb, *HOPELESS)
        except HOPELESS as error:
            raise _excuse(self.url, error, verb) from None

    def _prove(self) -> None:
        trial = f".trial-{secrets.token_hex(8)}"
        self._files.create(trial, b"first")
        twice = self._files.create(trial, b"second")
        self._files.delete(trial)
        if twice:
            raise UserError(
                f"{self.url}: it lets two create the same object, so workers cannot agree on who was first; "
                "choose a store that knows conditional writes (If-None-Match)"
            )

    def _full(self, path: str) -> str:
        return f"{self.url}/{path}"

    def _try(
        self,
        attempt: Callable[[], T],
        place: str,
        verb: str = WRITTEN,
        *final: type[OSError],
        of: str = "",  # what there is trouble with, if not with the folder
    ) -> T:
        """Tries again until `attempt` succeeds or patience ends; what is in `final` is raised at once."""
        growing = tenacity.wait_random_exponential(FIRST_WAIT, LONGEST_WAIT)
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self._patience),
            # The last try comes when patience ends, not after.
            wait=lambda state: min(growing(state), max(self._patience - (state.seconds_since_start or 0), 0)),
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, OSError) and not isinstance(e, final)),
            before_sleep=functools.partial(self._tell_of_trouble, of or self.url),
            sleep=self._pause,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except final:
            raise
        except OSError as error:
            raise _excuse(place, error, verb) from None

    def _tell_of_trouble(self, where: str, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason = _reason(state.outcome.exception())
            self._tell(f"{where}: {reason}; trying again for up to {self._patience:g} s")


def open_store(
    url: str,
    patience: float = 60.0,
    tell: Callable[[str], None] = lambda text: None,
    writable: bool = True,
    pause: Callable[[float], None] = time.sleep,
) -> Store:
    """Opens the output folder of a job.

    Args:
      url: a local path, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER.
      patience: seconds of trying again what fails.
      tell: gets a line when that begins.
      writable: make the folder if it is not there, and see that it can be written.
      pause: waits so many seconds.

    Raises:
      UserError: a scheme that is not known, a package that is missing, or a folder that cannot be written.
    """
    scheme, separator, rest = url.partition("://")
    files: Files
    if separator:
        url = url.rstrip("/")
        timeout = min(max(patience / TRIES, SHORTEST_TIMEOUT), LONGEST_TIMEOUT)
        files = Objects(_file_system(scheme, url, timeout), rest.strip("/"), timeout)
    else:
        root = pathlib.Path(os.path.expanduser(url))
        url, files = str(root), Disk(root)
    store = Store(url, files, patience, tell, pause)
    store.prepare(writable)
    return store


def _file_system(scheme: str, url: str, timeout: float) -> Any:
    if scheme not in SCHEMES:
        raise UserError(f"{url}: {scheme}:// is unknown; write a local path, s3://... or gs://...")
    if url == f"{scheme}:":
        raise UserError(f"{url}// names no bucket; write {scheme}://BUCKET/FOLDER")
    try:
        return (_s3 if scheme == "s3" else _gs)(timeout)
    except ImportError:
        raise UserError(f"{url} needs {SCHEMES[scheme]}; write pip install 'fogsculpt[jobs]'") from None
    except Exception as error:  # credentials that are damaged, above all
        raise UserError(f"{url}: {_reason(error)}") from None


# A try of ours is one of theirs, so that trouble is noticed and told. Listings must be fresh, and two stores
# of one process must not share a connection's state.
OPTIONS = {"use_listings_cache": False, "skip_instance_cache": True}


def _s3(timeout: float) -> Any:
    import fsspec

    config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0}}
    fs = fsspec.filesystem("s3", config_kwargs=config, **OPTIONS)
    fs.retries = 1
    return fs


def _gs(timeout: float) -> Any:
    import aiohttp
    import fsspec

    logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # or failures are printed with tracebacks
    timeouts = aiohttp.ClientTimeout(sock_connect=timeout, sock_read=timeout)
    fs = fsspec.filesystem("gs", requests_timeout=timeouts, **OPTIONS)
    for name in ("_request", "_get_file_request"):
        once = getattr(getattr(type(fs), name, None), "__wrapped__", None)
        if once is not None:
            setattr(fs, name, types.MethodType(once, fs))
    return fs


def _excuse(place: str, error: OSError, verb: str) -> UserError:
    """What to say when patience has ended."""
    reason = _reason(error)
    if verb == WRITTEN and (isinstance(error, OF_THE_FOLDER) or error.errno in OF_THE_DISK):
        return finish.unwritable(place, OSError(error.errno, reason))
    return Trouble(f"{place}: cannot be {verb}: {reason}; once that is mended, the same command goes on")


def _reason(error: BaseException | None) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:300] or type(error).__name__
