"""Processes that have met: a Python module in each of them."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 300  # longer is for ever


def started(module: str, flags: list[str], devices: int, processes: int) -> list[str]:
    """Runs the module with `flags`, and those of where the others are, in so many processes at once.

    Args:
      devices: simulated ones, of each process.

    Returns:
      What each of them told. They all ended well.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{found.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with contextlib.ExitStack() as stack:
        workers = []
        for i in range(processes):
            own = [f"--processes={processes}", f"--process_id={i}", f"--coordinator={coordinator}"]
            worker = subprocess.Popen(
                [sys.executable, "-m", module, *flags, *own],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            workers.append(worker)
        told = [worker.communicate(timeout=SECONDS)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(told)
    return told
