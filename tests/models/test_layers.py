"""What the parts promise beyond their originals: how an untrained model starts, and how one is built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine.models.attention import Transformer2DModel
from engine.models.layers import ZEROS, GroupNorm, ResnetBlock2D, TimestepEmbedding, host_rngs, resize_nearest


def test_host_rngs_draw_the_keys_of_flax():
    """Outside of a trace and inside."""

    def build(rngs):
        return nnx.to_pure_dict(nnx.state(TimestepEmbedding(4, 8, jax.nn.silu, rngs=rngs)))

    expected = build(nnx.Rngs(3))
    for found in (build(host_rngs(3)), jax.jit(lambda: build(host_rngs(3)))()):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_untrained_blocks_of_the_unet_are_the_identity():
    """So that a picture's way through the untrained network is open (see ZEROS)."""

    def blocks(x):
        resnet = ResnetBlock2D(
            8, 8, temb_channels=4, groups=2, epsilon=1e-5, act=jax.nn.silu, out_init=ZEROS, rngs=host_rngs()
        )
        transformer = Transformer2DModel(
            8,
            heads=2,
            layers=1,
            context_dim=6,
            groups=2,
            use_linear_projection=True,
            only_cross_attention=False,
            upcast=False,
            rngs=host_rngs(),
        )
        return transformer(resnet(x, jnp.ones((2, 4))), jnp.ones((2, 3, 6)))

    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    # Compiled in haste: the time of this test is the compiler's.
    out = jax.jit(blocks, compiler_options={"xla_backend_optimization_level": 0})(x)
    np.testing.assert_array_equal(out, x)


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


@pytest.mark.parametrize("size", [(6, 8), (7, 11), (3, 4), (1, 2), (5, 8)], ids=str)
def test_nearest_neighbour(size):
    """The pixel at i of n is the one at floor(i * old / n)."""
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (3, 4), strict=True))
    np.testing.assert_array_equal(resize_nearest(x, size)[0, :, :, 0], x[0, rows][:, columns, 0])
