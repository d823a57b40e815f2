"""TAESD, a tiny autoencoder that stands in for a large one: the same latents, for a rougher picture.

It decodes with 1.2 million parameters in place of the 49.5 million of Stable Diffusion's. It was distilled
from the autoencoders of Stable Diffusion (TAESD) and SDXL (TAESDXL) by Ollin Boer Bohan,
https://github.com/madebyollin/taesd. Its latents are scaled already, so its scaling_factor is 1. Pictures are
in [0, 1] for the layers and in [-1, 1] for all others, as in PyTorch diffusers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engine.config import from_json
from engine.models.autoencoder import Posterior
from engine.models.layers import Identity, activation, check_positive, conv, resize_nearest
from engine.types import UserError

FIXED = {"upsample_fn": ("nearest",), "shift_factor": (None, 0.0), "force_upcast": (False,)}
CLAMP = 3.0  # the decoder takes latents softly into [-3, 3]
CERTAIN = -30.0  # the log variance of a latent that is no distribution: the least of AutoencoderKL


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig:
    """vae/config.json of an AutoencoderTiny, with the names and defaults of PyTorch diffusers.

    `latent_magnitude` and `latent_shift` say how latents are kept as uint8, which the engine does not do.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "AutoencoderTinyConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        # diffusers writes decoder_block_out_channels a second time under this name, and never reads it
        options = {name: value for name, value in options.items() if name != "block_out_channels"}
        return from_json(cls, options, where, FIXED)

    def __post_init__(self):
        activation(self.act_fn, "act_fn")
        halves = [(f"{half}_block_out_channels", f"num_{half}_blocks") for half in ("encoder", "decoder")]
        check_positive(self, "in_channels", "out_channels", "latent_channels", "upsampling_scaling_factor")
        for widths, blocks in halves:
            check_positive(self, widths, blocks)
            found, counts = getattr(self, widths), getattr(self, blocks)
            if len(found) != len(counts):
                raise UserError(f"{blocks} has {len(counts)} entries for {len(found)} {widths}")
            if len(set(found)) > 1:  # diffusers builds such a model, which then fails on any picture
                raise UserError(f"{widths}={found!r}: write one number throughout")
        shrinks = 2 ** (len(self.num_encoder_blocks) - 1)
        if shrinks != self.scale:
            raise UserError(
                f"num_encoder_blocks shrinks pictures {shrinks} times, and num_decoder_blocks with "
                f"upsampling_scaling_factor={self.upsampling_scaling_factor} enlarges them {self.scale} times"
            )

    @property
    def scale(self) -> int:
        """How many pixels a latent spans, along one side."""
        return self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)

    def scaled(self, latents: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """As of an `AutoencoderConfig`."""
        return latents * self.scaling_factor

    def unscaled(self, latents: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        return latents / self.scaling_factor


class AutoencoderTinyBlock(nnx.Module):
    """Three convolutions beside the way straight on, and a ReLU (whatever `act` is) over their sum."""

    def __init__(self, channels: int, act: str, rngs: nnx.Rngs):
        # In PyTorch an activation stands between every two convolutions, and counts.
        self.conv = nnx.List(
            [conv(channels, channels, 3, rngs=rngs) if i % 2 == 0 else Identity() for i in range(5)]
        )
        self.act = activation(act, "act_fn")

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        first, _, second, _, third = self.conv
        return jax.nn.relu(x + third(self.act(second(self.act(first(x))))))


class _Activation(nnx.Module):
    def __init__(self, act: str):
        self.act = activation(act, "act_fn")

    def __call__(self, x):
        return self.act(x)


class _Enlarge(nnx.Module):
    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x):
        return resize_nearest(x, (x.shape[1] * self.factor, x.shape[2] * self.factor))


class EncoderTiny(nnx.Module):
    """Pictures in [-1, 1] to latents."""

    def __init__(self, config: AutoencoderTinyConfig, rngs: nnx.Rngs):
        width, layers = config.encoder_block_out_channels[0], []
        for i, blocks in enumerate(config.num_encoder_blocks):
            if i == 0:
                layers.append(conv(config.in_channels, width, 3, rngs=rngs))
            else:
                layers.append(conv(width, width, 3, stride=2, use_bias=False, rngs=rngs))
            layers += [AutoencoderTinyBlock(width, config.act_fn, rngs) for _ in range(blocks)]
        layers.append(conv(width, config.latent_channels, 3, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w L"]:
        x = (x + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class DecoderTiny(nnx.Module):
    """Latents to pictures in about [-1, 1]."""

    def __init__(self, config: AutoencoderTinyConfig, rngs: nnx.Rngs):
        width = config.decoder_block_out_channels[0]
        layers = [conv(config.latent_channels, width, 3, rngs=rngs), _Activation(config.act_fn)]
        for i, blocks in enumerate(config.num_decoder_blocks, 1):
            layers += [AutoencoderTinyBlock(width, config.act_fn, rngs) for _ in range(blocks)]
            if i < len(config.num_decoder_blocks):
                layers.append(_Enlarge(config.upsampling_scaling_factor))
                layers.append(conv(width, width, 3, use_bias=False, rngs=rngs))
        layers.append(conv(width, config.out_channels, 3, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, z: Float[Array, "B h w L"]) -> Float[Array, "B H W O"]:
        x = jnp.tanh(z / CLAMP) * CLAMP
        for layer in self.layers:
            x = layer(x)
        return 2 * x - 1


class AutoencoderTiny(nnx.Module):
    """TAESD; attributes are the keys of its checkpoints. It is called like an AutoencoderKL."""

    def __init__(self, config: AutoencoderTinyConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = EncoderTiny(config, rngs)
        self.decoder = DecoderTiny(config, rngs)

    def encode(self, image: Float[Array, "B H W C"]) -> Posterior:
        """The latent, float32, unscaled, as a mean that is all but certain.

        image: in [-1, 1]; H and W multiples of `scale`.
        """
        latents = self.encoder(image.astype(self.encoder.layers[0].kernel[...].dtype)).astype(jnp.float32)
        return Posterior(latents, jnp.full_like(latents, CERTAIN))

    def decode(self, z: Float[Array, "B h w L"]) -> Float[Array, "B H W O"]:
        """The picture of an unscaled latent, in float32 and about [-1, 1], not clipped."""
        return self.decoder(z.astype(self.decoder.layers[0].kernel[...].dtype)).astype(jnp.float32)
