"""A folder for files that are not yet whole. It goes with its process, and after one that was killed."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
import weakref

LOCK = ".lock"
DAY = 86400.0  # seconds


class Scratch:
    """A folder of this process's own inside of a common one.

    Its owner holds a lock, which the system takes back when the owner dies in whatever way; so others can
    tell what was left behind. Some file systems keep locks from other machines: of those, a folder counts as
    left behind when it has not changed for a day, too.
    """

    def __init__(self, common: pathlib.Path):
        self._common = common
        self._mine: pathlib.Path | None = None
        self._making = threading.Lock()

    def folder(self) -> pathlib.Path:
        """The folder. It is made when it is first needed, and again should it have vanished."""
        with self._making:
            if self._mine is None or not self._mine.is_dir():
                self._mine = self._make()
            return self._mine

    def clear(self) -> None:
        """Removes the folders of those who died."""
        with contextlib.suppress(OSError):
            for folder in self._common.iterdir():
                with contextlib.suppress(OSError):
                    _remove_if_left(folder)

    def _make(self) -> pathlib.Path:
        while True:
            with contextlib.suppress(FileExistsError):
                self._common.mkdir()  # not its parents: an output folder that is gone stays gone
            with contextlib.suppress(FileNotFoundError):  # one who tidied up was quicker: again
                mine = pathlib.Path(tempfile.mkdtemp(prefix=f"{MACHINE}-", dir=self._common))
                handle = os.open(mine / LOCK, os.O_RDWR | os.O_CREAT)
                weakref.finalize(self, _remove, mine, handle, os.getpid())
                with contextlib.suppress(OSError):  # no locks here: then nobody tidies up, either
                    fcntl.flock(handle, fcntl.LOCK_EX)
                os.stat(mine / LOCK)  # still there, and from now on safe
                return mine


def _this_machine() -> str:
    """Tells this boot of this machine from others, in letters of file names."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return socket.gethostname()


MACHINE = _this_machine()


def _remove_if_left(folder: pathlib.Path) -> None:
    handle = os.open(folder / LOCK, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.name.startswith(f"{MACHINE}-") or time.time() - folder.stat().st_mtime > DAY:
            shutil.rmtree(folder)
    finally:
        os.close(handle)


def _remove(folder: pathlib.Path, handle: int, owner: int) -> None:
    if os.getpid() != owner:  # a fork ends; its parent goes on
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # the last one turns off the light
