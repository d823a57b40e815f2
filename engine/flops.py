"""Arithmetic of a program, counted from its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# Products in cuDNN's attention: scores, and values by them; in its derivative the scores again, and four.
CUDNN = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}


def count(function: Callable, *arguments: Any) -> int:
    """Multiplications and additions of all matrix products and convolutions of a call.

    Args:
      arguments: arrays or jax.ShapeDtypeStruct; nothing is computed.

    Scans count their body once for each step, kernels theirs once for each block, what is mapped over devices
    counts once for each of them, and of a branch the costliest. Where platforms have branches of their own,
    what counts is the one for all others, whose padding is none. All else (norms, activations) is left out,
    as in the field's figures of utilisation.
    """
    return _of_jaxpr(jaxpr_of(function, *arguments))


def jaxpr_of(function: Callable, *arguments: Any) -> Any:
    """Of a function, jitted or not. One that has compiler options cannot be traced inside of another."""
    if hasattr(function, "trace"):
        return function.trace(*arguments).jaxpr.jaxpr
    return jax.make_jaxpr(function)(*arguments).jaxpr


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        return _of_dot(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if (products := CUDNN.get(name.removesuffix("_wrapper"))) is not None:
        return products * _of_attention(equation)
    inside = [_of_jaxpr(jaxpr) for jaxpr in _inner(equation.params.values())]
    if name == "scan":
        return equation.params["length"] * sum(inside)
    if name == "shard_map":  # in which each device has its part
        return equation.params["mesh"].size * sum(inside)
    if name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid) * sum(inside)
    if name == "cond":
        return inside[-1] if equation.params.get("branches_platforms") else max(inside)
    return sum(inside)


def _inner(values: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    found = []
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _inner(value)
    return found


def _of_dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _of_attention(equation: Any) -> int:
    """One product of all queries (B, T, N, K) and all keys (B, S, N, K)."""
    queries, keys = (value.aval.shape for value in equation.invars[:2])
    return 2 * math.prod(queries) * keys[1]


def _of_convolution(equation: Any) -> int:
    """Products with the zeros between dilated inputs are none: a gradient costs what its convolution does."""
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    _, channels, *places = (kernel[axis] for axis in numbers.rhs_spec)
    products = math.prod(equation.outvars[0].aval.shape) * channels * math.prod(places)
    return 2 * products // math.prod(equation.params["lhs_dilation"])
