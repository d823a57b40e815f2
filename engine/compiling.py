"""Programs that are compiled, or found in the cache and loaded, beside each other, before they are called.

Both are the compiler's work, not Python's: while it goes on, the next program can be traced.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from engine.parallel import Devices

THREADS = 2  # a sampler and a decoder


class Compiling:
    """What is under way for some devices. Calls are as they were; they only find what is there already."""

    def __init__(self, devices: Devices):
        # Processes that draw together compile in one order. What is compiled ahead pmap does not find, nor a
        # call that is profiled for its compiler.
        profiled = getattr(jax.config, "jax_enable_pgle", False)
        self.useful = devices.alone and devices.mode != "pmap" and not profiled
        self._devices = devices
        self._threads = ThreadPoolExecutor(THREADS, "compiling")
        self._under_way: dict[Callable, Future] = {}

    def begin(self, program: Any, shared: Any, batched: Any) -> None:
        """Has a program of `Devices.map` compiled for arguments like these: arrays, or shapes of them.

        Shapes in `shared` are of what `Devices.share` gives, and in `batched` of what such programs give.
        """
        if self.useful:
            devices = self._devices
            whole, split = devices.whole_sharding, devices.batch_sharding
            # What shard_map gives on one device is not split, as JAX says it.
            given = whole if devices.count == 1 and devices.mode == "shard_map" else split
            lowered = program.lower(_placed(shared, whole), _placed(batched, given))
            self._under_way[program] = self._threads.submit(lowered.compile)

    def wait(self, program: Any) -> None:
        """Waits for what was begun last of it: within JAX's contexts a call would compile it once more.

        Raises:
          jax.errors.JaxRuntimeError: the compiler's, such as that memory does not suffice.
        """
        if (begun := self._under_way.pop(program, None)) is not None:
            error = begun.exception()
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise error  # all else the call will meet, or not


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The tree with shapes that say where their arrays will lie."""

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)

    return jax.tree.map(placed, tree)
