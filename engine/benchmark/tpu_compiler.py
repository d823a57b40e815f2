"""The compiler for TPUs on a machine without one. It comes with `pip install libtpu`."""

import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

from engine.errors import UserError


def prepare() -> None:
    """To be called before JAX is imported: libtpu looks at the environment when it is loaded.

    Raises:
      UserError: libtpu is not installed.
    """
    assert "jax" not in sys.modules
    try:
        spec = importlib.util.find_spec("libtpu")
    except ValueError:  # an entry in sys.modules that stands for its absence
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError("no compiler for TPUs on this machine: pip install libtpu")
    (folder,) = spec.submodule_search_locations
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # or a second one at work here stops this one
        "TPU_LIBRARY_PATH": str(pathlib.Path(folder) / "libtpu.so"),
    }


def chips(topology: str) -> Sequence:
    """The chips of a topology such as "v5e:2x4", for programs that are compiled and never run.

    Raises:
      UserError: there is no such topology.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"topology={topology!r}: the compiler knows no such one ({reason}); v5e:2x2 or v6e:2x4"
        ) from None
