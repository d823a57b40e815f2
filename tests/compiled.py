"""How often a function was compiled: counted from JAX's own events, which no cache's eviction can hide."""

import collections

import jax

COMPILED: collections.Counter[str] = collections.Counter()  # "jit(name of the function)" -> times


def _count(event: str, seconds: float, fun_name: str = "", **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED[fun_name] += 1


jax.monitoring.register_event_duration_secs_listener(_count)
