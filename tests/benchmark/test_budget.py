"""Compiled programs against what they took when they were last looked at. Nothing is timed."""

import json
import subprocess
import sys

import jaxlib
import pytest

from tests.benchmark.budget import FILE

MORE = 1.05
WRITE = "python -m tests.benchmark.budget --write"
KNOWN = json.loads(FILE.read_text())

pytestmark = pytest.mark.skipif(
    jaxlib.__version__ != KNOWN["jaxlib"],
    reason=f"the figures are of jaxlib {KNOWN['jaxlib']}: {WRITE}",
)


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-m", "tests.benchmark.budget"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("program", KNOWN["programs"])
def test_program_takes_no_more_than_before(found, program):
    now, before = found["programs"][program], KNOWN["programs"][program]
    grown = {what: (before[what], value) for what, value in now.items() if value > before[what] * MORE}
    assert not grown, f"(before, now); if that is meant: {WRITE}"


def test_drawing_needs_no_collective(found):
    assert {name for name, cost in found["programs"].items() if cost["collectives"]} == {"train"}


def test_a_split_training_exchanges_params_and_gradients_alone(found):
    """CPUs gather them once and sum gradients on every device, in float32: three times the params."""
    assert found["exchange"] == KNOWN["exchange"]
    assert set(found["exchange"]["kinds"]) == {"all-gather", "all-reduce"}
    assert found["programs"]["train"]["moved"] <= 3 * found["exchange"]["params"]


def test_a_job_compiles_no_more_programs_than_before(found):
    assert found["compilations"] <= KNOWN["compilations"], WRITE
