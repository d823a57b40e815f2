"""What of a block is kept for its gradient, and what is computed again (Chen et al. 2016).

Each block is a `jax.checkpoint` of its own: the compiler may compute it again only when its gradient is due.
Around the whole network one would save nothing, since all of it is then computed again at once.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx


def is_product(primitive: Any, *_, **__) -> bool:
    """Whether the primitive multiplies matrices, convolutions included: dear to compute again."""
    return primitive.name in ("dot_general", "conv_general_dilated")


# remat -> what is kept from inside a block
POLICIES = {"dots": is_product, "blocks": jax.checkpoint_policies.nothing_saveable}

_chosen = contextvars.ContextVar("remat", default="none")


@contextlib.contextmanager
def remat(name: str) -> Iterator[None]:
    """Blocks that are traced inside keep for their gradient what POLICIES say; "none": everything."""
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def block(call: Callable) -> Callable:
    """Makes the __call__ of a module heed `remat`."""

    @functools.wraps(call)
    def heeding(self: nnx.Module, *args: Any) -> Any:
        if (name := _chosen.get()) == "none":
            return call(self, *args)
        graphdef, state = nnx.split(self)

        def pure(state: nnx.State, *args: Any) -> Any:
            return call(nnx.merge(graphdef, state), *args)

        return jax.checkpoint(pure, policy=POLICIES[name])(state, *args)

    return heeding
