"""What the parts promise beyond their originals: how an untrained model starts, and how one is built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine.models.attention import Transformer2DModel
from engine.models.layers import GroupNorm, TimestepEmbedding, Upsample2D, conv, host_rngs, resize_nearest


def test_host_rngs_draw_the_keys_of_flax():
    """Outside of a trace and inside."""

    def build(rngs):
        return nnx.to_pure_dict(nnx.state(TimestepEmbedding(4, 8, jax.nn.silu, rngs=rngs)))

    expected = build(nnx.Rngs(3))
    for found in (build(host_rngs(3)), jax.jit(lambda: build(host_rngs(3)))()):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (2, 5), (3, 3)])
@pytest.mark.parametrize(("stride", "padding"), [(1, None), (2, None), (2, 0)])
def test_convolutions_of_pictures_smaller_than_the_kernel(size, stride, padding):
    layer = conv(3, 4, 3, stride=stride, padding=padding, rngs=host_rngs())
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    layer.bias[...] = jnp.arange(4.0)
    plain = jax.lax.conv_general_dilated(
        x,
        layer.kernel[...],
        (stride, stride),
        layer.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = layer(x)
    assert found.shape == plain.shape
    np.testing.assert_allclose(found, plain + jnp.arange(4.0), atol=1e-5)


def test_words_reach_the_picture_from_the_first_step():
    """The gradient of every parameter on the words' way: with a branch at zero it would begin at zero."""

    def way(params, context):
        return jnp.square(nnx.merge(graphdef, nnx.State(params))(x, context)).sum()

    module = Transformer2DModel(
        8,
        heads=2,
        layers=1,
        context_dim=6,
        groups=2,
        use_linear_projection=True,
        only_cross_attention=False,
        rngs=host_rngs(),
    )
    graphdef, state = nnx.split(module, nnx.Param)
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    context = jax.random.normal(jax.random.key(1), (2, 3, 6))
    # Compiled in haste: the time of this test is the compiler's.
    gradients = jax.jit(jax.grad(way, (0, 1)), compiler_options={"xla_backend_optimization_level": 0})
    params, words = gradients(nnx.to_pure_dict(state), context)
    cross = params["transformer_blocks"][0]["attn2"]
    for gradient in (words, *(cross[name]["kernel"] for name in ("to_q", "to_k", "to_v"))):
        assert float(jnp.abs(gradient).max()) > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_group_norm_in_half_precision(dtype):
    """The statistics are float32's: with a mean of 100 spreads the result is as exact as its dtype."""
    norm = GroupNorm(2, 8, epsilon=1e-6, rngs=host_rngs())
    x = (100 + jax.random.normal(jax.random.key(0), (2, 16, 16, 8))).astype(dtype)
    found, exact = norm(x), norm(x.astype(jnp.float32))
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), exact, atol=float(jnp.finfo(dtype).eps) * jnp.abs(exact).max()
    )


@pytest.mark.parametrize("size", [(5, 3), (2, 2), (1, 1)], ids=str)
def test_twice_as_large_in_one_step_and_in_two(size):
    """What CPUs do, and what all others do."""
    layer = Upsample2D(6, rngs=host_rngs())
    x = jax.random.normal(jax.random.key(1), (2, *size, 6))
    expected = layer.conv(resize_nearest(x, (2 * size[0], 2 * size[1])))
    np.testing.assert_allclose(layer.in_one(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (7, 11), (3, 4), (1, 2), (5, 8)], ids=str)
def test_nearest_neighbour(size):
    """The pixel at i of n is the one at floor(i * old / n)."""
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (3, 4), strict=True))
    np.testing.assert_array_equal(resize_nearest(x, size)[0, :, :, 0], x[0, rows][:, columns, 0])
