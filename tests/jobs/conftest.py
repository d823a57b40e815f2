"""Servers of objects, and what else tests of output folders share."""

import tempfile

import pytest

from tests.jobs.gs_server import gs, gs_server  # noqa: F401
from tests.jobs.s3_server import s3, s3_server  # noqa: F401


@pytest.fixture(autouse=True)
def temporary_files_are_in_the_test_s_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def told():
    """What a store tells."""
    return []
