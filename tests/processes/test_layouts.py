"""One job on 1 device, on 8, on 2 processes of 4, and on 2 processes that draw each batch together."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from launch import cli, generate
from tests.long import LONG
from tests.tiny import SHALLOW, tiny_folder

ROOT = pathlib.Path(__file__).parents[2]
ROWS = [
    *({"prompt": f"a red fox, {i} times"} for i in range(21)),
    {"prompt": "a wide car", "width": 24},
    {"prompt": "a dog", "seed": 3, "guidance_scale": 2.5},
    {"prompt": "odd", "height": 17},
    *({"prompt": "a cat", "image": f"{name}.png", "strength": 0.7} for name in ("one", "broken", "two")),
]
PICTURES = len(ROWS) - 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    tiny_folder(folder / "model", **SHALLOW)
    for name in ("one", "broken", "two"):
        pixels = np.random.default_rng([*name.encode()]).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    broken = folder / "broken.png"
    broken.write_bytes(broken.read_bytes()[:5000])
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@contextlib.contextmanager
def worker(folder, out, devices, *flags):
    """launch.generate in a process with so many simulated devices."""
    own = {"prompts_file": folder / "prompts.jsonl", "model": folder / "model", "out": folder / out}
    own |= {"steps": 3, "seed": 7, "batch_size": 1, "shard_size": 5}
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "NPROC": "8",  # threads of a CPU, by which it cuts its sums; else it has as many as devices
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the time of these tests is the compiler's
        "XDG_CACHE_HOME": str(folder / f"cache-{devices}"),
    }
    command = [sys.executable, "-m", "launch.generate", *(f"--{k}={v}" for k, v in own.items()), *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def draw(folder, out, devices, *layouts):
    """Processes at once, one for each tuple of flags.

    Returns:
      The pictures that they made, by number; and what each process said.
    """
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(folder, out, devices, *flags)) for flags in layouts]
        said, told = zip(*(process.communicate(timeout=300) for process in workers), strict=True)
    # Two rows cannot be drawn; where one process does all the writing, the others have nothing to tell of it.
    assert 1 in [process.returncode for process in workers], told
    assert {process.returncode for process in workers} <= {0, 1}, told
    found = {}
    for path in (folder / out / "shards").glob("*/*.png"):
        with Image.open(path) as image:
            found[int(path.name.split("-")[0])] = np.asarray(image, np.int16)
    assert len(found) == PICTURES, told
    assert cli.exit_code(generate.main, [f"--verify={folder / out}"]) == cli.DONE
    return found, said


@pytest.fixture(scope="module")
def alone(folder):
    """The pictures of one device."""
    return draw(folder, "1x1", 1, ())[0]


def same_bits(pictures, others):
    assert pictures.keys() == others.keys()
    for number, image in pictures.items():
        np.testing.assert_array_equal(image, others[number], err_msg=str(number))


@LONG  # those of the tests below, and of tests/devices
def test_eight_devices(folder, alone):
    same_bits(draw(folder, "1x8", 8, ())[0], alone)


def test_two_processes_of_four_devices(folder, alone):
    processes = [("--processes=2", f"--process_id={i}") for i in range(2)]
    pictures, said = draw(folder, "2x4", 4, *processes)
    assert all("manifests" in text for text in said), "each has written shards"
    same_bits(pictures, alone)


def test_another_batch_size_changes_at_most_one_level(folder, alone):
    pictures, _ = draw(folder, "batch", 1, ("--batch_size=3",))
    assert max(np.abs(image - alone[number]).max() for number, image in pictures.items()) <= 1


def test_two_processes_that_draw_each_batch_together(folder, alone):
    """The model is split over the devices of both, as where it is too large for one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{found.getsockname()[1]}"
    together = ("--parallel=jit", "--split_params", coordinator, "--processes=2")
    pictures, said = draw(folder, "together", 2, *((*together, f"--process_id={i}") for i in range(2)))
    # (the CPU's way between processes, Gloo, speaks to stdout, too)
    assert ["manifests" in text for text in said] == [True, False], "the first writes what both have drawn"
    assert max(np.abs(image - alone[number]).max() for number, image in pictures.items()) <= 1
