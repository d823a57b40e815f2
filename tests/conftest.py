"""Every test checks the jaxtyping annotations of the engine at run time, and is compiled quickly.

The models of the tests are tiny: their time is the compiler's. FOGSCULPT_LONG=1 compiles as users do.
"""

import gc
import os
import sys

import pytest

from tests.compiling import quickly

# The workers take the cores; more threads than cores wait for each other, which costs them as much again.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# What the workers have imported is hundreds of thousands of objects: looked through as often as Python
# would, they take a fifteenth of the time of all tests. Once a file suffices (`swept`), and it must be, with
# the programs that JAX keeps: among thousands of them in memory, an exception in C++, of which PyTorch and
# JAX throw and catch many, takes milliseconds to find its way.
gc.set_threshold(100_000, 50, 100)

if not os.environ.get("FOGSCULPT_LONG"):
    quickly(os.environ)  # before JAX looks, and for the processes that tests start, too

from tests.typed import check_annotations  # noqa: E402

check_annotations("engine")


@pytest.fixture(scope="module", autouse=True)
def swept():
    yield
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()
    gc.collect()
    gc.freeze()  # what stays is modules: half a second to look through, for each of two hundred files


@pytest.fixture(scope="module")
def quick_compiler():
    """For files of tests by `pytestmark`: where JAX, too, need not draw as fast as it can."""
    from tests.tiny import compiled_quickly

    with compiled_quickly():
        yield
