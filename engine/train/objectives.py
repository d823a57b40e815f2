"""What is minimised: functions (params, frozen, batch, key) -> (loss, metrics)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from engine.config import AutoencoderStage, DiffusionStage
from engine.diffusion.losses import diffusion_loss
from engine.diffusion.schedules import Schedule
from engine.train.step import Loss


def to_float(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """0..255 to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def applier(graphdef: nnx.GraphDef) -> Callable:
    """The module as (params) -> module, for use inside jit."""
    return lambda params: nnx.merge(graphdef, nnx.State(params))


def autoencoder_loss(graphdef: nnx.GraphDef, config: AutoencoderStage) -> Loss:
    """(x - D(z))^2, z ~ E(x), plus kl_weight times the KL divergence per latent value.

    The bound of Kingma & Welling 2014 (equation 7) with a Gaussian likelihood, up to scale.

    params and frozen are dicts of the autoencoder's parts: together they are the whole of it.
    """
    build = applier(graphdef)

    def loss(params, frozen, batch, key):
        vae, x = build({**params, **frozen}), to_float(batch["image"])
        posterior = vae.encode(x)
        reconstruction = vae.decode(posterior.sample(key))
        kl = posterior.kl().mean() / posterior.mean[0].size
        error = reconstruction - x  # in [-2, 2]
        squares = jnp.square(error).mean((1, 2, 3))
        psnr = 10.0 * jnp.log10(4.0 / squares).mean()
        return squares.mean() + config.kl_weight * kl, {"psnr": psnr, "kl": kl}

    return loss


def text_to_image_loss(
    unet: nnx.GraphDef,
    text_encoder: nnx.GraphDef,
    vae: nnx.GraphDef,
    schedule: Schedule,
    prediction_type: str,
    config: DiffusionStage,
) -> Loss:
    """The denoising loss of U-Net and text encoder; frozen: {"vae": params, "empty_ids": (L,)}."""
    build_unet, build_text, build_vae = applier(unet), applier(text_encoder), applier(vae)

    def loss(params, frozen, batch, key):
        drop_key, loss_key = jax.random.split(key)
        vae_module = build_vae(frozen["vae"])
        latents = vae_module.encode(to_float(batch["image"])).mean  # a draw would be noise to learn
        latents = jax.lax.stop_gradient(latents * vae_module.config.scaling_factor)

        drop = jax.random.bernoulli(drop_key, config.caption_dropout, batch["ids"].shape[:1])
        ids = jnp.where(drop[:, None], frozen["empty_ids"][None], batch["ids"])
        context = build_text(params["text_encoder"]).context(ids)
        module = build_unet(params["unet"])

        def apply(x, t):
            return module(x, t, context)

        losses, _ = diffusion_loss(
            apply,
            latents,
            loss_key,
            schedule,
            prediction_type,
            config.time_sampling,
            config.time_mean,
            config.time_std,
        )
        return losses.mean(), {}

    return loss
