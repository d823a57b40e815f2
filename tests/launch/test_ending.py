"""How a program ends: its exit code, what it still does, and what it says where nobody can read it."""

import os
import pathlib
import subprocess
import sys

import pytest

from launch import cli

ROOT = pathlib.Path(__file__).parents[2]


def test_a_warning_of_the_engine_is_one_line_and_others_are_pythons():
    code = (
        "import warnings; from launch import cli; from engine.errors import UserNotice\n"
        "def job(argv): warnings.warn('slower', UserNotice); warnings.warn('a library'); return 0\n"
        "cli.main(job)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "warning: slower"
    assert "<string>:2: UserWarning: a library" in done.stderr


def test_a_fault_of_ours_has_a_code_of_its_own():
    """A scheduler must be able to tell it from pictures that could not be drawn."""
    code = "from launch import cli; cli.main(lambda argv: 1 // 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == cli.CRASHED
    assert "ZeroDivisionError" in done.stderr


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_what_was_asked_for_at_the_end_is_done_and_python_is_not_taken_apart():
    code = (
        "import atexit, sys; from launch import cli\n"
        "class Model:\n"
        "    def __del__(self): print('taken apart')\n"
        "model = Model()\n"
        "def job(argv):\n"
        "    atexit.register(print, 'by a library')\n"
        "    cli.say('drawn')\n"
        "    return cli.FAILED\n"
        "cli.main(job)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=BUFFERED)
    assert (done.returncode, done.stdout, done.stderr) == (cli.FAILED, "drawn\nby a library\n", "")


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk to write on")
MANY = "[cli.say('drawn') for _ in range(2000)]"  # more than a buffer takes


@FULL
@pytest.mark.parametrize("line", ["cli.say('drawn')", "print('drawn', end='')", MANY])
def test_a_full_disk_behind_standard_output_is_one_line(line):
    code = f"from launch import cli; cli.main(lambda argv: {line} or cli.DONE)"
    command = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    assert (done.returncode, done.stderr) == (
        cli.MISTAKE,
        "error: standard output: No space left on device\n",
    )


@FULL
@pytest.mark.parametrize(
    ("job", "status"),
    [
        ("cli.tell('drawn') or cli.FAILED", cli.FAILED),
        ("exec('raise UserError(1)')", cli.MISTAKE),
        ("1 // 0", cli.CRASHED),
        ("sys.exit(3)", 3),
    ],
)
def test_a_full_disk_behind_standard_error_changes_no_exit_code(job, status):
    code = (
        "import sys; from launch import cli; from engine.errors import UserError\n"
        f"cli.main(lambda argv: {job})"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=full, env=BUFFERED)
    assert done.returncode == status
