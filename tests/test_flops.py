"""Arithmetic that can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from engine import chips, flops
from tests.tiny import tiny_model


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_matrix_products():
    assert flops.count(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert flops.count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(4, 3, 5), shape(4, 5, 7)) == (
        2 * 4 * 3 * 5 * 7
    )


def convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(stride):
    x, kernel = shape(2, 8, 8, 3), shape(3, 3, 3, 5)
    forward = 2 * (2 * (8 // stride) ** 2 * 5) * (3 * 3 * 3)

    def loss(x, kernel):
        return convolve(x, kernel, stride).sum()

    assert flops.count(loss, x, kernel) == forward
    # Each gradient costs what the convolution does, but for the edges, where padding gives some more.
    both = flops.count(jax.grad(loss, argnums=(0, 1)), x, kernel)
    assert forward * 2 <= both <= forward * 3.5


def test_scans_branches_and_nested_programs():
    def f(x, w):
        x = jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w), None), x, length=6)[0]
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops.count(f, shape(3, 5), shape(5, 5)) == (6 + 2) * 2 * 3 * 5 * 5


def test_remat_shows_its_second_forward_pass():
    w = shape(5, 5)

    def loss(w, x):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    plain = flops.count(jax.grad(loss), w, shape(3, 5))
    again = flops.count(jax.grad(jax.checkpoint(loss)), w, shape(3, 5))
    assert plain < again <= plain + 2 * 2 * 3 * 5 * 5


def test_a_whole_unet_agrees_with_the_compiler():
    model = tiny_model()
    from engine.parts import module

    def apply(params, x, context):
        return module(model.unet, params)(x, jnp.ones(2), context)

    arguments = (model.unet.params, jnp.ones((2, 8, 8, 4)), jnp.ones((2, 16, 24)))
    theirs = jax.jit(apply).lower(*arguments).cost_analysis()["flops"]
    # Theirs has norms and activations in it, and not the zeros around a picture; both weigh something here.
    assert 0.85 < flops.count(apply, *arguments) / theirs < 1.15


def test_a_cpu_has_no_peak():
    assert chips.peak(jax.devices("cpu")[0]) is None
