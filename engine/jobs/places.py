"""The two kinds of places that a job writes to, disks and object stores: what they do, without patience."""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol, runtime_checkable

from engine import finish
from engine.jobs.scratch import Scratch
from engine.types import UserError

SLOWEST = 2**18  # bytes/s: what an object store takes longer for has failed

# Errors that are mistakes in programs, not troubles of networks.
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)
# What libraries say, each with an error of its own, where asking again will not help.
FORBIDDEN = re.compile("Credential|ProfileNotFound|Forbidden|ParamValidation|, 40[13]$")


@runtime_checkable
class Files(Protocol):
    """A place. Paths are relative, with slashes; what fails is an OSError."""

    scratch_name: str  # where the scratch folder is, for people

    def prepare(self, writable: bool) -> None: ...
    def scratch(self) -> pathlib.Path: ...
    def read(self, path: str) -> bytes: ...
    def open(self, path: str) -> BinaryIO: ...
    def names(self, path: str) -> list[str]: ...
    def times(self, path: str) -> dict[str, float]: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> bool: ...
    def publish(self, local: pathlib.Path, path: str) -> None: ...
    def delete(self, path: str) -> None: ...


class Disk:
    """Files of this machine, or of a file system that is mounted here."""

    def __init__(self, root: pathlib.Path):
        self._root, self._scratch = root, Scratch(root / ".scratch")
        self._identity: tuple[int, int] | None = None
        self.scratch_name = str(root)

    def prepare(self, writable: bool) -> None:
        if writable:
            finish.prepare_folder(self._root)
            self._scratch.clear()
        else:
            self.names("")
        self._identity = _identity(self._root)

    def scratch(self) -> pathlib.Path:
        self._check()
        return self._scratch.folder()

    def read(self, path: str) -> bytes:
        with self.open(path) as file:
            return file.read()

    def open(self, path: str) -> BinaryIO:
        try:
            return open(self._root / path, "rb")
        except FileNotFoundError:
            self._check()
            raise

    def names(self, path: str) -> list[str]:
        try:
            found = os.listdir(self._root / path)
        except FileNotFoundError:
            found = []
        self._check()
        return [name for name in found if not name.startswith(".")]

    def times(self, path: str) -> dict[str, float]:
        found = {}
        for name in self.names(path):
            with contextlib.suppress(FileNotFoundError):  # gone since
                found[name] = os.stat(self._root / path / name).st_mtime
        return found

    def write(self, path: str, data: bytes) -> None:
        place = self._place(path)
        with self._temporary(data) as temporary:
            os.replace(temporary, place)
        finish.fsync_folder(place.parent)

    def create(self, path: str, data: bytes) -> bool:
        place = self._place(path)
        with self._temporary(data) as temporary:
            try:
                os.link(temporary, place)  # unlike a move, it never takes the place of another
            except FileExistsError:
                return place.read_bytes() == data
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise UserError(
                        f"{self._root}: its file system has no hard links, by which workers agree on who was "
                        "first; choose another folder, or write s3:// or gs:// where it is such a bucket"
                    ) from None
                raise
        finish.fsync_folder(place.parent)
        return True

    def publish(self, local: pathlib.Path, path: str) -> None:
        place = self._place(path)
        is_folder = local.is_dir()
        for part in [*local.iterdir(), local] if is_folder else [local]:
            _fsync(part)
        if is_folder and place.is_dir():
            self._exchange(local, path)
        else:
            os.replace(local, place)
        finish.fsync_folder(place.parent)

    def _exchange(self, local: pathlib.Path, path: str) -> None:
        """Fills a folder that is there, from a worker that died before it was done.

        Or from one that is done at this very moment: so no picture is away even for the blink of an eye. And
        `local` stays whole until all is there, should it fail half-way.
        """
        names = os.listdir(local)
        for name in names:
            link = self._scratch.folder() / secrets.token_hex(8)
            os.link(local / name, link)
            os.replace(link, self._root / path / name)
            link.unlink(missing_ok=True)  # between two names of the same file a move does nothing
        for name in set(self.names(path)) - set(names):
            self.delete(f"{path}/{name}")
        _fsync(self._root / path)
        shutil.rmtree(local, ignore_errors=True)

    def delete(self, path: str) -> None:
        (self._root / path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[pathlib.Path]:
        """A file in the scratch folder that is safely on the disk. It goes, unless it is moved."""
        path = self._scratch.folder() / secrets.token_hex(8)
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _place(self, path: str) -> pathlib.Path:
        """The place of a file that is to be written, its folder made."""
        self._check()
        place = self._root / path
        if place.parent != self._root and not place.parent.is_dir():
            place.parent.mkdir(exist_ok=True)
            finish.fsync_folder(self._root)
        return place

    def _check(self) -> None:
        """Fails where the folder is gone. The mount point of a disk that has gone is a folder, too, but an
        empty one: all would be to do again, and what it takes would be lost.
        """
        if self._identity is not None and _identity(self._root) != self._identity:
            raise OSError(errno.ESTALE, "the folder has gone, or another one is in its place")


class Objects:
    """Objects of S3 or Google Cloud Storage, by fsspec."""

    def __init__(self, fs: Any, root: str, timeout: float):
        """Args:
        timeout: seconds without an answer that end a call.
        """
        self._fs, self._root, self._timeout = fs, root, timeout
        common = pathlib.Path(tempfile.gettempdir()) / f"fogsculpt-{os.getuid()}"
        self._scratch = Scratch(common)
        self.scratch_name = f"{common} (TMPDIR)"

    def prepare(self, writable: bool) -> None:
        self._scratch.clear()
        if not writable:
            self.names("")

    def scratch(self) -> pathlib.Path:
        return self._scratch.folder()

    def read(self, path: str) -> bytes:
        return self._call(self._fs.cat_file, self._full(path))

    def open(self, path: str) -> BinaryIO:
        size = self._call(self._fs.info, self._full(path))["size"]
        local = tempfile.NamedTemporaryFile(dir=self.scratch())  # noqa: SIM115, the caller closes it
        try:
            self._call(self._fs.get_file, self._full(path), local.name, size=size)
        except BaseException:
            local.close()
            raise
        return local

    def names(self, path: str) -> list[str]:
        return list(self._listed(path))

    def times(self, path: str) -> dict[str, float]:
        files = {name: entry for name, entry in self._listed(path).items() if entry["type"] == "file"}
        # as S3 calls it; as Google does
        return {name: (e.get("LastModified") or e["mtime"]).timestamp() for name, e in files.items()}

    def _listed(self, path: str) -> dict[str, dict[str, Any]]:
        """What lies in a folder, by its name, as fsspec tells of it."""
        folder = self._full(path).rstrip("/")
        try:
            found = self._call(self._fs.ls, folder, detail=True, size=None)
        except FileNotFoundError:
            return {}
        # Some programs make an object of the folder's own name.
        names = {entry["name"].removeprefix(folder).strip("/"): entry for entry in found}
        return {name: entry for name, entry in names.items() if name and not name.startswith(".")}

    def write(self, path: str, data: bytes) -> None:
        self._call(self._fs.pipe_file, self._full(path), data, size=len(data))

    def create(self, path: str, data: bytes) -> bool:
        try:
            self._call(self._fs.pipe_file, self._full(path), data, mode="create", size=len(data))
            return True
        except PermissionError:
            raise
        except OSError as error:
            # That it exists is told in several ways, and an answer may be lost on its way: look.
            try:
                return self.read(path) == data
            except FileNotFoundError:
                raise error from None

    def publish(self, local: pathlib.Path, path: str) -> None:
        if not local.is_dir():
            self._call(self._fs.put_file, str(local), self._full(path), size=local.stat().st_size)
            local.unlink()
            return
        names = os.listdir(local)
        sources, places = [str(local / name) for name in names], [self._full(f"{path}/{n}") for n in names]
        self._call(self._fs.put, sources, places, size=sum(map(os.path.getsize, sources)))
        for name in set(self.names(path)) - set(names):
            self.delete(f"{path}/{name}")
        shutil.rmtree(local, ignore_errors=True)

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call(self._fs.rm_file, self._full(path))

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _call(self, function: Callable, *args: Any, size: int | None = 0, **options: Any) -> Any:
        """Every library beneath has its own errors; here they are OSErrors.

        Args:
          size: bytes that are carried. None: a listing, of which only each page has its time.
        """
        timeout = None if size is None else self._timeout + size / SLOWEST
        try:
            return function(*args, timeout=timeout, **options)
        except BUGS:
            raise
        except Exception as error:
            name = type(error).__name__
            text = f"{name}: {error}"
            if isinstance(error, TimeoutError) or "Timeout" in name:
                raise TimeoutError(errno.ETIMEDOUT, f"no answer within {self._timeout:g} s") from error
            if FORBIDDEN.search(text) and not isinstance(error, FileNotFoundError):
                raise PermissionError(errno.EACCES, text) from error
            if isinstance(error, OSError):
                raise
            raise OSError(errno.EIO, text) from error


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _fsync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
