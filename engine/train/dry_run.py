"""What a training would take, without a step of it: parameters, memory, arithmetic."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from engine import flops
from engine.config import StageConfig
from engine.train import step as steps
from engine.train.data import BatchAt
from engine.train.loop import placed, program
from engine.types import Params

GIB = 2**30


def fit(
    name: str,
    loss: steps.Loss,
    params: Params,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    config: StageConfig,
    *,
    batch_at: BatchAt,
    around: steps.Around = steps.itself,
    **_: Any,
) -> Params:
    """In place of `loop.fit`: prints the table, and gives the params back as they are."""
    rows = table(name, loss, params, frozen, optimizer, config, batch_at(0), around)
    width = max(len(what) for what, _ in rows)
    print("\n".join(f"{what:{width}}  {value}" for what, value in rows) + "\n", flush=True)
    return params


def table(
    name: str,
    loss: steps.Loss,
    params: Params,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    config: StageConfig,
    batch: Mapping[str, np.ndarray],
    around: steps.Around,
) -> list[tuple[str, str]]:
    """Compiles the step of a stage for the devices at hand, and says what the compiler thinks of it.

    Args:
      params, frozen, batch: arrays or shapes; nothing is computed with them.
    """
    devices, init, step = program(name, loss, params, optimizer, config, around=around)
    state = placed(jax.eval_shape(init, params), devices.shardings)
    kept = placed(frozen, devices.shardings)
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.batch_sharding), dict(batch)
    )
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    compiled = step.lower(state, kept, rows, key).compile()
    memory = compiled.memory_analysis()
    arithmetic = flops.count(step, state, kept, rows, key)
    return [
        ("stage", f"{name}: {config.steps} steps of {config.batch_size} pictures"),
        ("devices", f"{devices.count} x {devices.devices[0].device_kind}"),
        ("parameters that are trained", f"{_count(params):,}"),
        ("parameters that stay", f"{_count(frozen):,}"),
        ("state on a device", _size(_bytes(state))),
        ("what stays, on a device", _size(_bytes(kept))),
        ("memory of a step beside them", _size(memory.temp_size_in_bytes)),
        ("arithmetic of a step", f"{arithmetic / 1e12:.4g} TFLOP"),
        ("of a picture", f"{arithmetic / config.batch_size / 1e12:.4g} TFLOP"),
    ]


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


def _bytes(tree: Any) -> int:
    """On one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _size(count: int) -> str:
    return f"{count / GIB:.3f} GiB"
