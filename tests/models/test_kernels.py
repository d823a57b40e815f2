"""The kernels for TPUs, interpreted, against the compiler's own attention: values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from engine.models import attention, kernels


def arrays(T, S, K, dtype=jnp.float32):
    sizes = {"q": T, "k": S, "v": S}
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, size, 3, K), dtype) for i, size in enumerate(sizes.values())
    )
    return q, k, v


def loss(q, k, v):
    return jnp.square(attention.attend(q, k, v).astype(jnp.float32)).sum()


def whole(f):
    return f


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "MIN_QUERIES", 1)


@pytest.mark.parametrize(
    ("T", "S", "K"),
    [(256, 256, 40), (256, 77, 40), (200, 130, 64), (128, 77, 160), (300, 300, 16)],
)
def test_kernel_equals_the_compilers_attention(small, T, S, K):
    args = arrays(T, S, K)
    expected, gradients = attention.attend(*args), jax.grad(loss, (0, 1, 2))(*args)
    with pltpu.force_tpu_interpret_mode(), kernels.kernels("tpu", whole):
        found, own = attention.attend(*args), jax.grad(loss, (0, 1, 2))(*args)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(own, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def uses_kernel(queries: int, platform: str, mask=None) -> bool:
    with kernels.kernels(platform, whole):
        jaxpr = jax.make_jaxpr(lambda *a: attention.attend(*a, mask=mask))(*arrays(queries, 8, 8))
    return "pallas_call" in str(jaxpr)


def test_kernels_are_for_long_sequences_on_tpus():
    assert uses_kernel(kernels.MIN_QUERIES, "tpu")
    assert not uses_kernel(kernels.MIN_QUERIES - 1, "tpu")
    assert not uses_kernel(kernels.MIN_QUERIES, "cpu")
    assert not uses_kernel(kernels.MIN_QUERIES, "tpu", mask=jnp.ones((1, 1, kernels.MIN_QUERIES, 8), bool))
    assert "pallas_call" not in str(jax.make_jaxpr(attention.attend)(*arrays(kernels.MIN_QUERIES, 8, 8)))


@pytest.mark.parametrize("length", [128, 1024, 4096, 8320, 128 * 31, 16384])
def test_blocks_divide_and_fit(length):
    for narrow in (True, False):
        sizes = kernels.block_sizes(length, length, narrow)
        for name in ("block_q", "block_k", "block_q_dkv", "block_k_dq"):
            block = getattr(sizes, name)
            assert length % block == 0 and block % kernels.LANES == 0
        assert sizes.block_q * sizes.block_k * 4 <= 4 * 2**20
