"""Attention, in one place: every query, key and value of every model meets in `attend`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engine.models import kernels, merging, perturbing, remat, watching
from engine.models.layers import GroupNorm, Identity, conv, linear

# How many scores a CPU has in memory at a time, 8 MB of them: more leave its caches, and with 32 MB and more
# the whole was measured up to three times slower.
CPU_SCORES = 2**21
QUERY_BLOCK = 512

# What the layers that attend to the words make of them, keys and values (B, S, D), by the layer's place in
# the network. It is the same at every step. Behind them may be pairs of what else they attend to, which adds
# to what they find in the words (engine.models.ip_adapter).
Read = dict[str, tuple[Array, ...]]


def _attend(q, k, v, mask=None):
    """softmax(q k^T) v, of (..., T, K), (..., S, K) and (..., S, K); sums in float32."""
    scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # Divided by their sum only after they met v: that makes K columns to divide instead of S. The maximum
    # cancels, so it needs no derivative.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)


def _attend_in_blocks(q, k, v):
    """The same of (B, N, T, K), for one block of queries of one head after another.

    The derivative computes a block's scores again, which is quicker than to fetch them from memory.
    """
    B, N, T, K = q.shape
    blocks = -(-T // QUERY_BLOCK)
    size = -(-T // blocks)

    def one_head(qkv):
        q, k, v = qkv
        queries = jnp.pad(q, ((0, blocks * size - T), (0, 0))).reshape(blocks, size, K)
        attend_block = jax.checkpoint(lambda q: _attend(q, k, v), prevent_cse=False)  # a loop shares nothing
        return jax.lax.map(attend_block, queries).reshape(blocks * size, K)[:T]

    heads = tuple(a.reshape(B * N, -1, K) for a in (q, k, v))
    return jax.lax.map(one_head, heads).reshape(B, N, T, K)


def _attend_on_platform(q, k, v):
    return jax.lax.platform_dependent(q, k, v, cpu=_attend_in_blocks, default=_attend)


def attend(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    *,
    mask: Array | None = None,
) -> Float[Array, "B T N K"]:
    """softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017), softmax in float32.

    Args:
      mask: boolean, broadcastable to (B, N, T, S); False hides a key.

    Products of half precision are summed in float32, which Stable Diffusion 2 needs: its scores overflow
    float16 (`upcast_attention` of its config, where scores are of the dtype of q).
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    # Heads first: XLA's CPU matmul is several times slower with the head between batch and channels.
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    B, N, T, _ = q.shape
    if mask is None and (flash := kernels.flash(q, k)) is not None:
        out = flash(q, k, v)
    elif mask is not None or B * N * T * k.shape[2] <= CPU_SCORES:
        out = _attend(q, k, v, mask)
    else:
        # Its loop over batch and heads is one that the compiler would spread over devices as it likes.
        out = kernels.on_each_device(_attend_on_platform)(q, k, v)
    return out.swapaxes(1, 2)


class Attention(nnx.Module):
    """Multi-head attention over tokens, of themselves or of a context."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.to_q = linear(dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_k = linear(context_dim or dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_v = linear(context_dim or dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([linear(dim, dim, rngs=rngs), Identity()])
        self.heads = heads
        self.place = ""  # in a network whose words are read beforehand

    def read(self, seen: Float[Array, "B S E"]) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"]]:
        """Keys and values."""
        return self.to_k(seen), self.to_v(seen)

    def __call__(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"] | Read | None = None
    ) -> Float[Array, "B T D"]:
        def split_heads(a):
            return a.reshape(*a.shape[:-1], self.heads, -1)

        if isinstance(context, dict):
            read = context[self.place]
        else:
            read = self.read(x if context is None else context)
        q, k, v, *more = map(split_heads, (self.to_q(x), *read))
        if context is not None:
            watching.see(q, k)
        out = attend(q, k, v)
        if context is None:
            out = perturbing.apart(self.place, out, v)
        for further_k, further_v in zip(more[::2], more[1::2], strict=True):
            out = out + attend(q, further_k, further_v)
        return self.to_out[0](out.reshape(x.shape))


class SpatialAttention(Attention):
    """Attention of one head among the pixels of a picture, with a norm and a residual: the autoencoder's."""

    def __init__(self, channels: int, *, groups: int, epsilon: float, rngs: nnx.Rngs):
        super().__init__(channels, heads=1, qkv_bias=True, rngs=rngs)
        self.group_norm = GroupNorm(groups, channels, epsilon=epsilon, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        return x + super().__call__(self.group_norm(x).reshape(B, H * W, C)).reshape(x.shape)


class GEGLU(nnx.Module):
    """x W * gelu(x V) (Shazeer 2020), W and V in one matrix."""

    def __init__(self, dim: int, out: int, *, rngs: nnx.Rngs):
        self.proj = linear(dim, 2 * out, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
        x, gate = jnp.split(self.proj(x), 2, axis=-1)
        return x * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """A gated linear unit of 4 times the width, and the way back."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.net = nnx.List([GEGLU(dim, 4 * dim, rngs=rngs), Identity(), linear(4 * dim, dim, rngs=rngs)])

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.net[2](self.net[0](x))


def layer_norm(dim: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> nnx.LayerNorm:
    """LayerNorm with the variance in two passes: the fast one-pass formula loses digits."""
    return nnx.LayerNorm(dim, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class BasicTransformerBlock(nnx.Module):
    """Attention among the pixels, attention from the pixels to the words, feed-forward; all residual."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        context_dim: int,
        only_cross_attention: bool,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(dim, rngs)
        first_context = context_dim if only_cross_attention else None
        self.attn1 = Attention(dim, heads=heads, context_dim=first_context, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs)
        self.attn2 = Attention(dim, heads=heads, context_dim=context_dim, rngs=rngs)
        self.norm3 = layer_norm(dim, rngs)
        self.ff = FeedForward(dim, rngs=rngs)
        self.only_cross_attention = only_cross_attention

    def read(self, context: Float[Array, "B L E"]) -> Read:
        """What its layers make of the words."""
        layers = (self.attn1, self.attn2) if self.only_cross_attention else (self.attn2,)
        return {layer.place: layer.read(context) for layer in layers}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B L E"] | Read,
        merge: Callable[[Array], merging.Merged] | None = None,
    ) -> Float[Array, "B T D"]:
        """merge: tells by x which of its tokens attend as one; None: none do."""
        seen = context if self.only_cross_attention else None
        if merge is None:
            x = x + self.attn1(self.norm1(x), seen)
        else:
            tokens = merge(x)
            x = x + tokens.apart(self.attn1(tokens.together(self.norm1(x)), seen))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, steered by a context; residual.

    The projections in and out are 1x1 convolutions in Stable Diffusion 1 and linear layers in 2: the
    same arithmetic, stored in another shape.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        layers: int,
        context_dim: int,
        groups: int,
        use_linear_projection: bool,
        only_cross_attention: bool,
        rngs: nnx.Rngs,
    ):
        def projection():
            if use_linear_projection:
                return linear(channels, channels, rngs=rngs)
            return conv(channels, channels, 1, rngs=rngs)

        self.norm = GroupNorm(groups, channels, epsilon=1e-6, rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    channels,
                    heads=heads,
                    context_dim=context_dim,
                    only_cross_attention=only_cross_attention,
                    rngs=rngs,
                )
                for _ in range(layers)
            ]
        )
        self.proj_out = projection()

    @remat.block
    def __call__(
        self, x: Float[Array, "B H W C"], context: Float[Array, "B L D"] | Read
    ) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        h = self.proj_in(self.norm(x)).reshape(B, H * W, C)
        merge = merging.chosen(H, W)
        watching.at(H, W)
        for block in self.transformer_blocks:
            h = block(h, context, merge)
        return x + self.proj_out(h.reshape(B, H, W, C))
