"""JSON files, and files and folders that appear whole or not at all."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.types import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError, with the file, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object as diffusers lays it out, and waits until it is on the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `path` to write into, which becomes `path` when the block ends well.

    Whatever ends the block early (an exception, Ctrl-C, a full disk) leaves `path` as it was. A folder that
    is replaced is out of sight for the moment between two renames, and only then deleted.

    Args:
      marker: a file that every folder of this kind holds. A folder without it is not replaced, even when
        asked: it is something else.
      overwrite: replace a folder that exists.

    Raises:
      UserError: `path` exists, and may not be replaced.
      OSError: the disk is full, or the place cannot be written.
    """
    path = path.expanduser().resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not path.is_dir():
            raise UserError(f"{path} is a file: choose another name for the folder")
        if not overwrite:
            raise UserError(f"{path} already exists: choose another folder, or say overwrite=True")
        if not (path / marker).is_file():
            raise UserError(f"{path} holds no {marker}, so it is not replaced: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    new, old = (path.with_name(f".{path.name}.{state}-{unique}") for state in ("new", "old"))
    new.mkdir()
    try:
        yield new
        _exchange(new, path, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Puts `new` in the place of `path`, and what was there in `old`."""
    existed = path.exists()
    if existed:
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if existed:
            old.rename(path)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to, which takes its place when the block ends well."""
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        yield new
        new.replace(path)
        _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_weights(path: str | Path, what: str, write: str, unwrap: str = "d") -> Path:
    """The file of a network that is one .safetensors file alone.

    Args:
      what: it is called in messages; write: what to write instead of a path where there is none.
      unwrap: makes the tensors, in Python, of `d`, which torch.load finds in a pickle.

    Raises:
      UserError: there is none, or one that is never opened.
    """
    path = Path(os.path.expanduser(path))
    if path.name.endswith(PICKLES):
        raise UserError(
            f"{path} is in a format that is never opened because it can run code: convert it with PyTorch, "
            f"python -c \"import torch, safetensors.torch as s; d = torch.load('{path}', weights_only=True); "
            f"s.save_file({{k: v.contiguous() for k, v in {unwrap}.items()}}, "
            f"'{path.with_suffix('.safetensors')}')\""
        )
    if not path.is_file():
        raise UserError(f"no {what} {path}: write the path of a .safetensors file, {write}")
    return path
