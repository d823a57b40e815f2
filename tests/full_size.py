"""A model of the full size, loaded and run for a step on this machine: what it takes of memory, and of time.

  python -m tests.full_size --architecture sd15 [--side 256]

Writes a folder of random weights (2 to 7 GB) into a temporary place, loads it in bfloat16 as a user would,
and draws one picture in one step. Prints the most memory that the process had, beside weights and
temporaries of the largest program. Linux alone.
"""

import argparse
import pathlib
import re
import tempfile
import time

import jax
import numpy as np

import engine
from engine.parallel import Devices
from engine.weights.random_folder import ARCHITECTURES, random_folder


class Watched(Devices):
    """Devices that keep what was last called."""

    def __init__(self):
        super().__init__("shard_map", jax.devices()[:1])
        self.calls = {}

    def map(self, f):
        mapped = super().map(f)

        def run(shared, batched):
            self.calls[f.__name__] = (mapped, (shared, batched))
            return mapped(shared, batched)

        run.lower, run.eval_shape = mapped.lower, mapped.eval_shape
        return run

    def temporaries(self) -> dict[str, int]:
        """Bytes, of each program."""
        found = {name: mapped.lower(*given).compile() for name, (mapped, given) in self.calls.items()}
        return {name: program.memory_analysis().temp_size_in_bytes for name, program in found.items()}


def peak() -> int:
    """Bytes that the process had at most, so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found, "this is no Linux"
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sd15")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as at:
        random_folder(pathlib.Path(at) / "model", given.architecture)
        jax.devices()
        before, start = peak(), time.monotonic()
        devices = Watched()
        pipe = engine.load(pathlib.Path(at) / "model", "bfloat16", devices)
        loaded, ready = peak(), time.monotonic()
    weights = sum(leaf.nbytes for part in pipe.model.parts.values() for leaf in jax.tree.leaves(part.params))
    images = pipe.generate(["a lighthouse"], steps=1, height=given.side, width=given.side, seed=0)
    drawn, done = peak(), time.monotonic()
    assert images.shape == (1, given.side, given.side, 3) and np.ptp(images) > 0
    most = max(devices.temporaries().values())
    GiB = 2**30
    print(f"{given.architecture}, {given.side} px")
    print(f"weights          {weights / GiB:5.2f} GiB, {most / GiB:.2f} of temporaries")
    print(f"before           {before / GiB:5.2f} GiB")
    print(f"loaded           {loaded / GiB:5.2f} GiB, {loaded / weights:.2f} of them, {ready - start:.0f} s")
    print(
        f"a picture drawn  {drawn / GiB:5.2f} GiB, {drawn / (weights + most):.2f} of both, "
        f"{done - ready:.0f} s with compilation"
    )


if __name__ == "__main__":
    main()
