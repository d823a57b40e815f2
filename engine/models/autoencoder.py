"""The autoencoder: pictures to latents of an eighth (or so) of the size, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from engine.config import from_json
from engine.models.attention import SpatialAttention
from engine.models.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
    activation,
    check_positive,
    conv,
)
from engine.types import UserError

EPSILON = 1e-6
FIXED = {"shift_factor": (None, 0.0)}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """vae/config.json, with the names and defaults of PyTorch diffusers.

    `force_upcast` asks for float32 whatever the dtype of the rest: the weights overflow in float16.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    latents_mean: tuple[float, ...] | None = None  # of each channel, as Playground 2.5 has them
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "AutoencoderConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        return from_json(cls, options, where, FIXED)

    def __post_init__(self):
        for name, known in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            kinds = getattr(self, name)
            if set(kinds) != {known}:
                raise UserError(f"{name}={kinds!r}: the one known block is {known}")
            if len(kinds) != len(self.block_out_channels):
                raise UserError(
                    f"{name} has {len(kinds)} entries for {len(self.block_out_channels)} block_out_channels"
                )
        activation(self.act_fn, "act_fn")
        check_positive(
            self,
            *("in_channels", "out_channels", "block_out_channels", "layers_per_block"),
            *("latent_channels", "norm_num_groups"),
        )
        if (self.latents_mean is None) != (self.latents_std is None):
            raise UserError("latents_mean and latents_std go together: write both or none")
        for name in ("latents_mean", "latents_std"):
            if (values := getattr(self, name)) is not None and len(values) != self.latent_channels:
                raise UserError(
                    f"{name} has {len(values)} numbers for latent_channels={self.latent_channels}"
                )
        if min(self.latents_std or (1.0,)) <= 0:
            raise UserError(f"latents_std={self.latents_std}: write numbers above 0")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(f"norm_num_groups={self.norm_num_groups} does not divide {channels} channels")

    @property
    def scale(self) -> int:
        """How many pixels a latent spans, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scaled(self, latents: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Of the autoencoder's own, those that a U-Net learns to draw."""
        if self.latents_mean is None:
            return latents * self.scaling_factor
        return (latents - jnp.array(self.latents_mean)) * (self.scaling_factor / jnp.array(self.latents_std))

    def unscaled(self, latents: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """What `scaled` was made of."""
        if self.latents_mean is None:
            return latents / self.scaling_factor
        return latents * (jnp.array(self.latents_std) / self.scaling_factor) + jnp.array(self.latents_mean)


class Posterior(NamedTuple):
    """The encoder's diagonal Gaussian over latents (Kingma & Welling 2014), before scaling_factor."""

    mean: Float[Array, "B h w C"]
    logvar: Float[Array, "B h w C"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "B h w C"]:
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape)

    def kl(self) -> Float[Array, " B"]:
        """KL divergence to the unit Gaussian, summed over a picture's latent, in nats."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum((1, 2, 3))


class _Block(nnx.Module):
    """Residual blocks, and a change of size where `down` or `up` asks for one."""

    def __init__(self, in_channels, out_channels, layers, config, *, down=False, up=False, rngs):
        self.resnets = nnx.List(
            [
                _resnet(in_channels if i == 0 else out_channels, out_channels, config, rngs)
                for i in range(layers)
            ]
        )
        if down:
            self.downsamplers = nnx.List([Downsample2D(out_channels, padding=0, rngs=rngs)])
        if up:
            self.upsamplers = nnx.List([Upsample2D(out_channels, rngs=rngs)])
        self.down, self.up = down, up

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if self.down:
            x = self.downsamplers[0](x)
        if self.up:
            x = self.upsamplers[0](x)
        return x


class _MidBlock(nnx.Module):
    def __init__(self, channels, config, rngs):
        self.resnets = nnx.List([_resnet(channels, channels, config, rngs) for _ in range(2)])
        if config.mid_block_add_attention:
            self.attentions = nnx.List(
                [SpatialAttention(channels, groups=config.norm_num_groups, epsilon=EPSILON, rngs=rngs)]
            )
        self.has_attention = config.mid_block_add_attention

    def __call__(self, x):
        x = self.resnets[0](x)
        if self.has_attention:
            x = self.attentions[0](x)
        return self.resnets[1](x)


def _resnet(in_channels, out_channels, config, rngs):
    return ResnetBlock2D(
        in_channels,
        out_channels,
        temb_channels=None,
        groups=config.norm_num_groups,
        epsilon=EPSILON,
        act=activation(config.act_fn, "act_fn"),
        rngs=rngs,
    )


class Encoder(nnx.Module):
    """Pictures to the moments of their latents."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], 3, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                _Block(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    config,
                    down=i < len(widths) - 1,
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = _MidBlock(widths[-1], config, rngs)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w M"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to pictures."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid_block = _MidBlock(widths[0], config, rngs)
        self.up_blocks = nnx.List(
            [
                _Block(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    config,
                    up=i < len(widths) - 1,
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(widths[-1], config.out_channels, 3, rngs=rngs)

    def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B H W O"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The variational autoencoder of Rombach et al. 2022; attributes are the keys of its checkpoints."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        latent = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = conv(2 * latent, 2 * latent, 1, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(latent, latent, 1, rngs=rngs)

    def encode(self, image: Float[Array, "B H W C"]) -> Posterior:
        """The latent's distribution, float32, unscaled. image: in [-1, 1]; H and W multiples of `scale`."""
        moments = self.encoder(image.astype(self.encoder.conv_in.kernel[...].dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z: Float[Array, "B h w C"]) -> Float[Array, "B H W O"]:
        """The picture of an unscaled latent, in float32 and about [-1, 1], not clipped."""
        z = z.astype(self.decoder.conv_in.kernel[...].dtype)
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)
