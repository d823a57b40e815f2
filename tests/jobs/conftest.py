"""Servers of objects, for every test of jobs."""

from tests.jobs.gs_server import gs, gs_server  # noqa: F401
from tests.jobs.s3_server import s3, s3_server  # noqa: F401
