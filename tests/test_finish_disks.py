"""Disks that refuse a picture: what was there stays, nothing half-written stays, and one line says why."""

import contextlib
import errno
import os
import resource

import numpy as np
import pytest

from engine import finish
from engine.types import UserError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@contextlib.contextmanager
def largest_file(size: int):
    """The system itself fails a write beyond `size` bytes, half-way through."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_rights_in(folder):
    """`folder` is read-only to us, also where the tests run as root."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


WRITERS = {
    "png": lambda path: finish.write_png(path, noise(64, 64, 3), {"prompt": "a fox"}),
    "webp": lambda path: finish.write_animation(path, noise(3, 64, 64, 3)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "picture"
    path.write_bytes(b"old")
    with (
        largest_file(1000),
        pytest.raises(UserError, match="picture: cannot be written: File too large") as error,
    ):
        write(path)
    assert "\n" not in str(error.value)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("picture", b"old")]
    write(path)
    assert len(path.read_bytes()) > 1000


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_no_rights(tmp_path, write):
    with no_rights_in(tmp_path), pytest.raises(UserError, match=r"Permission denied; choose a folder.*--out"):
        write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_no_space(tmp_path, write, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finish.write_png(tmp_path / "a.png", noise(4, 4, 3), {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_the_picture_s_name(tmp_path):
    (tmp_path / "a.png" / "full").mkdir(parents=True)
    with pytest.raises(UserError, match="something else has that name"):
        finish.write_png(tmp_path / "a.png", noise(4, 4, 3), {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_prepare_folder(tmp_path):
    for _ in range(2):
        folder = finish.prepare_folder(tmp_path / "a" / "b")
        assert folder.is_dir() and list(folder.iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match="something else has that name"):
            finish.prepare_folder(tmp_path / name)
    with pytest.raises(UserError, match="null byte"):
        finish.prepare_folder(str(tmp_path / "a") + "\0b")
    with pytest.raises(UserError, match="name too long"):
        finish.prepare_folder(tmp_path / ("x" * 300))
    with largest_file(100), pytest.raises(UserError, match="File too large"):
        finish.prepare_folder(tmp_path / "a")


def test_prepare_folder_without_rights(tmp_path):
    with no_rights_in(tmp_path):
        for name in (".", "below"):
            with pytest.raises(UserError, match="Permission denied"):
                finish.prepare_folder(tmp_path / name)
