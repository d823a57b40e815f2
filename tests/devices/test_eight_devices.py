"""Runs the tests of on_eight.py: a process shows as many devices as it had when JAX first looked."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def test_on_eight_simulated_devices(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the time of these tests is the compiler's
    }
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(HERE / "on_eight.py")]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
