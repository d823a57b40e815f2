"""What takes too long for each run of the tests, and is like something that does not."""

import os

import pytest

LONG = pytest.mark.skipif(not os.environ.get("FOGSCULPT_LONG"), reason="with FOGSCULPT_LONG=1")
