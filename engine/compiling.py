"""Programs that are compiled, or found in the cache and loaded, beside each other, before they are called.

Both are the compiler's work, not Python's: while it goes on, the next program can be traced.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from engine.parallel import Devices

THREADS = 2  # a sampler and a decoder


class Compiling:
    """What is under way for some devices. Calls are as they were; they only find what is there already."""

    def __init__(self, devices: Devices):
        # Processes that draw together compile in one order; pmap does not share what was compiled ahead.
        self.useful = devices.alone and devices.mode != "pmap"
        self._devices = devices
        self._threads = ThreadPoolExecutor(THREADS, "compiling")
        self._under_way: dict[Callable, list[Future]] = {}

    def begin(self, program: Any, shared: Any, batched: Any) -> None:
        """Has a program of `Devices.map` compiled for arguments like these: arrays, or shapes of them.

        Shapes in `shared` are of what `Devices.share` gives, and in `batched` of what such programs give.
        """
        if self.useful:
            whole, split = self._devices.whole_sharding, self._devices.batch_sharding
            lowered = program.lower(_placed(shared, whole), _placed(batched, split))
            self._under_way.setdefault(program, []).append(self._threads.submit(lowered.compile))

    def wait(self, program: Any) -> None:
        """Waits for it, if it was begun: or it would be compiled twice. What went wrong its call tells."""
        wait(self._under_way.pop(program, []))


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The tree with shapes that say where their arrays will lie."""

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, tree)
