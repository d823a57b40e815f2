"""Kernels against the compiler's own attention. Those of TPUs are interpreted, cuDNN's need a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from engine import flops
from engine.errors import UserNotice
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
    monkeypatch.setattr(kernels, "MIN_TOKENS", 1)


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


def uses_kernel(queries: int, keys: int, platform: str, mask=None) -> bool:
    with kernels.kernels(platform, whole):
        jaxpr = jax.make_jaxpr(lambda *a: attention.attend(*a, mask=mask))(*arrays(queries, keys, 8))
    return "pallas_call" in str(jaxpr)


def test_kernels_are_for_long_sequences_on_tpus():
    many = kernels.MIN_TOKENS
    assert uses_kernel(many, many, "tpu")
    assert not uses_kernel(many - 1, many - 1, "tpu")
    assert not uses_kernel(many, 77, "tpu")  # the words of a prompt
    assert not uses_kernel(many, many, "cpu")
    assert not uses_kernel(many, many, "tpu", mask=jnp.ones((1, 1, many, many), bool))
    assert "pallas_call" not in str(jax.make_jaxpr(attention.attend)(*arrays(many, many, 8)))


@pytest.mark.parametrize("length", [128, 1024, 4096, 8320, 128 * 31, 16384])
def test_blocks_divide_and_fit(length):
    for narrow in (True, False):
        sizes = kernels.block_sizes(length, length, narrow)
        for name in ("block_q", "block_k", "block_q_dkv", "block_k_dq"):
            block = getattr(sizes, name)
            assert length % block == 0 and block % kernels.LANES == 0
        assert sizes.block_q * sizes.block_k * 4 <= 4 * 2**20


def half(T, S, K=40):
    return arrays(T, S, K, jnp.bfloat16)


@pytest.fixture
def cudnn(monkeypatch):
    """As if there were a GPU with cuDNN: programs can be lowered for it, not compiled."""
    rules = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(rules, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(rules, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(rules, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(kernels, "cudnn_attends", lambda channels, dtype: dtype == jnp.bfloat16)


def for_gpus(f, *args):
    """The jaxpr as on a GPU, and what the compiler gets."""
    with kernels.kernels("gpu", whole):
        # A lambda of its own: JAX keeps traces by function, and would not ask for the kernel again.
        traced = jax.jit(lambda *args: f(*args)).trace(*args)
        return str(traced.jaxpr), traced.lower(lowering_platforms=("cuda",)).as_text()


def test_long_sequences_on_gpus_are_cudnns(cudnn, small):
    _, text = for_gpus(attention.attend, *half(256, 130))
    assert text.count("@__cudnn$fmhaSoftmax(") == 1 and "fmha_scale" in text
    assert "tensor<2x256x3x40xbf16>" in text  # batch, queries, heads, channels: the order of the projections
    assert "dot_general" not in text

    _, text = for_gpus(jax.grad(loss, (0, 1, 2)), *half(256, 130))
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


def test_what_cudnn_does_not_take_is_the_compilers(cudnn, small):
    for args in (arrays(256, 256, 40), half(256, 77), half(255, 256)):
        assert "cudnn" not in for_gpus(attention.attend, *args)[1]


def test_cudnns_products_count_as_the_compilers(cudnn, small):
    def of(f, platform):
        with kernels.kernels(platform, whole):
            return flops.count(lambda *args: f(*args), *half(256, 130))

    assert of(attention.attend, "gpu") == of(attention.attend, "cpu") > 0
    # The derivative: cuDNN has not kept the scores and computes them again, one product of 7.
    gradient = jax.grad(loss, (0, 1, 2))
    assert of(gradient, "gpu") * 6 == of(gradient, "cpu") * 7


def test_without_cudnn_it_says_so_and_attends(small):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    kernels.cudnn_attends.cache_clear()
    args = half(256, 130)
    expected = attention.attend(*args)
    with (
        kernels.kernels("gpu", whole),
        pytest.warns(UserNotice, match="without cuDNN.*: cuDNN is not detected"),
    ):
        found = attention.attend(*args)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(("T", "S", "K"), [(256, 256, 40), (1024, 1024, 64), (200, 130, 128)])
def test_cudnn_equals_the_compilers_attention(small, T, S, K):
    args = half(T, S, K)
    expected, gradients = attention.attend(*args), jax.grad(loss, (0, 1, 2))(*args)
    with kernels.kernels("gpu", whole):
        assert kernels.cudnn_attends(K, jnp.dtype(jnp.bfloat16))
        found, own = attention.attend(*args), jax.grad(loss, (0, 1, 2))(*args)
    for a, b in zip((found, *own), (expected, *gradients), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.abs(a - b).max() <= 2.0**-6 * np.abs(b).max()
