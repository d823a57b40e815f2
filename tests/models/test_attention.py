"""`attend` against its definition, whole and in blocks, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.models import attention
from engine.models.attention import attend

SHAPES = [(2, 19, 19, 3, 8), (1, 33, 7, 2, 5), (2, 8, 21, 1, 4)]  # B, T, S, N, K


def draw(shape, scale=1.0, seed=0):
    """q, k, v."""
    B, T, S, N, K = shape
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(scale * random.standard_normal((B, n, N, K)), jnp.float32) for n in (T, S, S))


def definition(q, k, v, mask=None):
    """Vaswani et al. 2017, equation 1, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("BTNK,BSNK->BNTS", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("BNTS,BSNK->BTNK", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture(params=["whole", "in blocks"])
def path(request, monkeypatch):
    """Both ways on a CPU: all scores at once, and blocks of at most 6 queries."""
    monkeypatch.setattr(attention, "CPU_SCORES", 2**40 if request.param == "whole" else 1)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 6)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(path, shape):
    q, k, v = draw(shape, scale=2.0)
    np.testing.assert_allclose(attend(q, k, v), definition(q, k, v), atol=5e-6)


def test_gradient(path):
    """Against central differences of the definition in float64."""
    given, direction = draw((1, 13, 9, 2, 4)), draw((1, 13, 9, 2, 4), seed=1)
    _, slope = jax.jvp(lambda *a: jnp.sum(attend(*a) ** 3), given, direction)
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(attend(*a) ** 3), argnums=(0, 1, 2)))(*given)

    def along(h):
        return np.sum(
            definition(*(np.float64(a) + h * np.float64(d) for a, d in zip(given, direction, strict=True)))
            ** 3
        )

    expected = (along(1e-4) - along(-1e-4)) / 2e-4
    by_hand = sum(np.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
    np.testing.assert_allclose([slope, by_hand], expected, rtol=1e-4)


def test_transformations(path):
    """jit, vmap, scan with rematerialization, and shard_map give what a plain call gives."""
    q, k, v = draw((4, 19, 11, 2, 4))
    expected = attend(q, k, v)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(attend, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    pairs = tuple(a.reshape(2, 2, *a.shape[1:]) for a in (q, k, v))
    scanned = jax.lax.scan(lambda carry, qkv: (carry, jax.checkpoint(attend)(*qkv)), 0, pairs)[1]
    for name, found in {
        "jit": jax.jit(lambda *qkv: attend(*qkv))(q, k, v),
        "vmap": jax.jit(jax.vmap(attend))(*pairs),
        "scan": scanned,
        "shard_map": jax.jit(spread)(q, k, v),
        "gradient under shard_map": jax.jit(jax.grad(lambda q: spread(q, k, v).sum()))(q),
    }.items():
        wanted = jax.grad(lambda q: attend(q, k, v).sum())(q) if "gradient" in name else expected
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=2e-6, err_msg=name)


def test_other_platforms_are_not_lowered(path):
    """A loop over blocks on CPUs where there are many scores; all scores at once everywhere else."""
    traced = jax.jit(lambda *qkv: attend(*qkv)).trace(*draw(SHAPES[0]))
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        in_blocks = platform == "cpu" and path == "in blocks"
        assert ("stablehlo.while" in text) == in_blocks, platform
        assert ("tensor<2x3x19x19xf32>" in text) == (not in_blocks), platform


def test_other_platforms_are_not_compiled_in_the_gradient(path):
    """JAX keeps a place for what any branch would save for its derivative; XLA drops it."""
    gradient = jax.jit(jax.grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2)))
    text = gradient.lower(*draw(SHAPES[0])).compile().as_text()
    assert " conditional(" not in text
    assert ("f32[2,3,19,19]" in text) == (path == "whole")


def test_memory_of_the_gradient():
    """The scores of 8 heads of 1,024 tokens are 32 MB; no more than a block of each kind is ever there."""
    q, k, v = (jax.ShapeDtypeStruct((1, 1024, 8, 16), jnp.float32),) * 3
    gradient = jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2))
    assert jax.jit(gradient).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes < 2**24


def test_equal_keys_mean_the_values(path):
    q, k, v = draw(SHAPES[0])
    out = attend(q, jnp.ones_like(k), v)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), out.shape), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_scores_beyond_the_range_of_float16(path, dtype):
    """Scores of 120,000 at the query's own key and of 0 elsewhere: the values come back as they are."""
    eye = 700 * jnp.eye(16, dtype=dtype)[None, :, None]
    v = jnp.arange(16, dtype=dtype)[None, :, None, None] * jnp.ones((1, 1, 1, 16), dtype)
    out = attend(eye, eye, v)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(v, np.float32))


def test_bfloat16(path):
    """Within 2^-7 of the largest value: the weights and the result are rounded to 8 bits, nothing else is."""
    q, k, v = (a.astype(jnp.bfloat16) for a in draw(SHAPES[0], scale=2.0))
    expected = definition(*(a.astype(jnp.float32) for a in (q, k, v)))
    error = np.abs(np.asarray(attend(q, k, v), np.float64) - expected).max()
    assert error <= 2.0**-7 * np.abs(expected).max()


def test_mask():
    """A hidden key counts for nothing, and a causal mask is the one of each prefix alone."""
    q, k, v = draw((2, 5, 5, 3, 4), scale=2.0)
    causal = jnp.tril(jnp.ones((5, 5), bool))
    out = attend(q, k, v, mask=causal)
    np.testing.assert_allclose(out, definition(q, k, v, mask=np.asarray(causal)), atol=5e-6)
    for t in range(5):
        alone = attend(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1])
        np.testing.assert_allclose(out[:, t : t + 1], alone, atol=2e-6)
