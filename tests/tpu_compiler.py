"""The compiler for TPUs on a machine without one. It comes with `pip install libtpu`.

Import this before JAX: libtpu looks at the environment when it is loaded.
"""

import importlib.util
import os
import pathlib
from typing import Any

spec = importlib.util.find_spec("libtpu")
if spec is None or spec.origin is None:
    raise SystemExit("libtpu is not installed: pip install libtpu")
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LIBRARY_PATH": str(pathlib.Path(spec.origin).parent / "libtpu.so"),
}

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

CHIP = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]


def shapes(tree: Any) -> Any:
    """Arrays or their shapes as shapes on one chip of a v5e."""
    place = jax.sharding.SingleDeviceSharding(CHIP)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
