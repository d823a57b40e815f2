"""IP-Adapters (Ye et al. 2023): the U-Net attends to a picture as it does to words.

What CLIP's image encoder says of the picture becomes a few tokens. To these every layer that attends to the
words attends, too, by keys and values of its own, and adds what it finds: softmax(q k^T) v + scale softmax(q
k_ip^T) v_ip (their equation 5). Three ways lead to the tokens: a matrix, from the picture's vector alone;
"plus", a few queries that look at the encoder's patches (Alayrac et al. 2022, the perceiver resampler); and
"full", a token of each patch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engine.models.attention import attend, layer_norm
from engine.models.layers import Identity, linear

HEAD = 64  # channels of a head of the queries that look at patches


@dataclasses.dataclass(frozen=True)
class IPAdapterConfig:
    """What the shapes of the weights in a file tell."""

    seen: int  # channels that the image encoder says of the picture, or of each patch
    context: int  # channels of a token
    widths: tuple[int, ...]  # channels of the U-Net's layers that attend to words, in the adapter's order
    tokens: int = 4  # of a picture; as many as there are patches where these become them ("full")
    way: str = "plain"  # to the tokens: plain, plus or full
    hidden: int = 0  # plus: channels, layers, channels of all heads, and of the feed-forward layers
    depth: int = 0
    inner: int = 0
    wide: int = 0

    @property
    def of_patches(self) -> bool:
        """Whether it reads what the encoder says of each patch, before its last layer."""
        return self.way != "plain"


class ImageProjection(nnx.Module):
    """A picture's vector -> tokens."""

    def __init__(self, config: IPAdapterConfig, rngs: nnx.Rngs):
        self.proj = linear(config.seen, config.tokens * config.context, rngs=rngs)
        self.norm = layer_norm(config.context, rngs)
        self.context = config.context

    def __call__(self, seen: Float[Array, "B E"]) -> Float[Array, "B T D"]:
        return self.norm(self.proj(seen).reshape(len(seen), -1, self.context))


class PatchProjection(nnx.Module):
    """Each patch -> a token; the "full" way."""

    def __init__(self, config: IPAdapterConfig, rngs: nnx.Rngs):
        self.proj = nnx.List(
            [
                linear(config.seen, config.seen, rngs=rngs),
                Identity(),
                linear(config.seen, config.context, rngs=rngs),
                layer_norm(config.context, rngs),
            ]
        )

    def __call__(self, seen: Float[Array, "B P E"]) -> Float[Array, "B T D"]:
        first, _, second, norm = self.proj
        return norm(second(jax.nn.gelu(first(seen), approximate=False)))


class PerceiverAttention(nnx.Module):
    """Latents attend to the patches and to each other."""

    def __init__(self, config: IPAdapterConfig, rngs: nnx.Rngs):
        hidden, inner = config.hidden, config.inner
        self.norm1 = layer_norm(hidden, rngs)
        self.norm2 = layer_norm(hidden, rngs)
        self.to_q = linear(hidden, inner, use_bias=False, rngs=rngs)
        self.to_kv = linear(hidden, 2 * inner, use_bias=False, rngs=rngs)
        self.to_out = linear(inner, hidden, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B P H"], latents: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = jnp.split(self.to_kv(jnp.concatenate([x, latents], axis=1)), 2, axis=-1)
        q, k, v = (a.reshape(*a.shape[:-1], -1, HEAD) for a in (self.to_q(latents), k, v))
        return self.to_out(attend(q, k, v).reshape(*latents.shape[:-1], -1))


class Resampler(nnx.Module):
    """Patches -> what a few learned queries find in them; the "plus" way."""

    def __init__(self, config: IPAdapterConfig, rngs: nnx.Rngs):
        hidden = config.hidden
        scale = hidden**-0.5
        self.latents = nnx.Param(scale * rngs.params.normal((1, config.tokens, hidden)))
        self.proj_in = linear(config.seen, hidden, rngs=rngs)
        self.proj_out = linear(hidden, config.context, rngs=rngs)
        self.norm_out = layer_norm(config.context, rngs)

        def feed_forward() -> nnx.List:
            up = linear(hidden, config.wide, use_bias=False, rngs=rngs)
            down = linear(config.wide, hidden, use_bias=False, rngs=rngs)
            return nnx.List([layer_norm(hidden, rngs), up, Identity(), down])

        self.layers = nnx.List(
            [nnx.List([PerceiverAttention(config, rngs), feed_forward()]) for _ in range(config.depth)]
        )

    def __call__(self, seen: Float[Array, "B P E"]) -> Float[Array, "B T D"]:
        x = self.proj_in(seen)
        latents = jnp.broadcast_to(self.latents[...].astype(x.dtype), (len(x), *self.latents.shape[1:]))
        for attention, (norm, up, _, down) in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + down(jax.nn.gelu(up(norm(latents)), approximate=False))
        return self.norm_out(self.proj_out(latents))


WAYS = {"plain": ImageProjection, "plus": Resampler, "full": PatchProjection}


class KeysAndValues(nnx.Module):
    """Those of a layer."""

    def __init__(self, context: int, width: int, rngs: nnx.Rngs):
        self.to_k_ip = linear(context, width, use_bias=False, rngs=rngs)
        self.to_v_ip = linear(context, width, use_bias=False, rngs=rngs)


class IPAdapter(nnx.Module):
    """The whole; attributes are the keys of its checkpoints, where every other layer attends to words."""

    def __init__(self, config: IPAdapterConfig, rngs: nnx.Rngs):
        self.config = config
        self.image_proj = WAYS[config.way](config, rngs)
        layers: list[nnx.Module] = []
        for width in config.widths:
            layers += [Identity(), KeysAndValues(config.context, width, rngs)]
        self.ip_adapter = nnx.List(layers)

    @property
    def dtype(self):
        """Of the params, in which it computes."""
        return self.ip_adapter[1].to_k_ip.kernel[...].dtype

    def tokens(self, seen: Float[Array, "B *P E"]) -> Float[Array, "B T D"]:
        """What the U-Net attends to, from what the image encoder says."""
        return self.image_proj(seen)

    def read(
        self, tokens: Float[Array, "B T D"], scales: Float[Array, " N"]
    ) -> list[tuple[Float[Array, "B T _"], Float[Array, "B T _"]]]:
        """Keys of each layer and its values, scaled by its own, in the adapter's order."""

        def values(layer: KeysAndValues, scale: Float[Array, ""]) -> Float[Array, "B T _"]:
            return (layer.to_v_ip(tokens) * scale).astype(tokens.dtype)

        layers = self.ip_adapter[1::2]
        return [(layer.to_k_ip(tokens), values(layer, scales[i])) for i, layer in enumerate(layers)]
