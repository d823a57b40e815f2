import math

import jax
import jax.numpy as jnp
import pytest

from engine.benchmark import timing


def test_calls_take_turns():
    called = []
    seconds = timing.in_turn({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert called == ["a", "b"] * 3
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_of_the_rounds():
    """One slow round of both changes nothing."""
    found = timing.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert found == (2.0, 2.0, 3.0)
    assert str(found) == "2.00 (2.00 to 3.00)"


def test_first_call_knows_the_compilers_part():
    program = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((7, 7))
    first = timing.first_call(lambda: jax.block_until_ready(program(x)))
    assert 0 < first.compiling <= first.seconds
    again = timing.first_call(lambda: jax.block_until_ready(program(x)))
    assert again.compiling == 0
    assert math.isclose(float(program(x)[0, 0]), 7 * math.sin(1), rel_tol=1e-5)


@pytest.mark.parametrize("lengths", [(2, 1)])
def test_rounds_of_both_are_needed(lengths):
    with pytest.raises(ValueError):
        timing.ratio([1.0] * lengths[0], [1.0] * lengths[1])
