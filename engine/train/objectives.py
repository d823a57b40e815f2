"""What is minimised: functions (params, frozen, batch, key) -> (loss, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from engine.config import AutoencoderStage, ObjectiveConfig
from engine.diffusion.losses import by_timestep, check_terminal, diffusion_loss
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.diffusion.schedules import schedule_for
from engine.train.step import Batch, Loss
from engine.types import Latents, Params


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


def words_loss(graphdef: nnx.GraphDef, facts: Mapping[str, int]) -> Loss:
    """Tells from a caption what its scene shows: the sum over the facts of the cross-entropies, in nats.

    The text half of what CLIP (Radford et al. 2021) does for Stable Diffusion: words that mean the same come
    to lie together, and what is rare weighs as much as what fills the picture. Each answer is a linear
    function of the sum over the context, since a fresh U-Net attends to all words alike.

    params: {"text_encoder": params, "heads": see `fresh_heads`}; frozen: nothing.
    """
    build = applier(graphdef)

    def loss(params, frozen, batch, key):
        context = build(params["text_encoder"]).context(batch["ids"])
        read = context.sum(1) / context.shape[1] ** 0.5  # of unit variance for unlike words
        heads = [params["heads"][name] for name in facts]  # a dict inside jit is sorted by name
        told = [(read @ head["kernel"] + head["bias"]).astype(jnp.float32) for head in heads]
        truths = batch["facts"].T
        losses = map(optax.softmax_cross_entropy_with_integer_labels, told, truths)
        right = jnp.stack([logits.argmax(-1) == truth for logits, truth in zip(told, truths, strict=True)])
        return sum(each.mean() for each in losses), {"accuracy": right.mean()}

    return loss


def fresh_heads(width: int, facts: Mapping[str, int]) -> Params:
    """A linear layer for each fact: {name: {"kernel": (width, answers), "bias": (answers,)}}."""
    return {
        name: {"kernel": jnp.zeros((width, answers)), "bias": jnp.zeros(answers)}
        for name, answers in facts.items()
    }


# (frozen, batch, which captions are left out) -> what the U-Net learns to draw, and what it is told
Encode = Callable[[Any, Batch, Bool[Array, " B"]], tuple[Latents, Float[Array, "B L D"]]]


def text_to_image_loss(
    unet: nnx.GraphDef,
    text_encoder: nnx.GraphDef,
    vae: nnx.GraphDef,
    scheduler: SchedulerConfig,
    objective: ObjectiveConfig,
) -> Loss:
    """`denoising_loss` of pictures and captions.

    frozen: {"vae": params, "text_encoder": params, "empty_ids": (L,)}; batch: {"image", "ids"}, or in place
    of the pictures the "mean" of their latents.
    """
    build_text, build_vae = applier(text_encoder), applier(vae)

    def encode(frozen, batch, drop):
        vae_module = build_vae(frozen["vae"])
        if "mean" in batch:
            latents = batch["mean"].astype(jnp.float32)
        else:
            latents = vae_module.encode(to_float(batch["image"])).mean  # a draw would be noise to learn
        ids = jnp.where(drop[:, None], frozen["empty_ids"][None], batch["ids"])
        context = build_text(frozen["text_encoder"]).context(ids)
        return latents * vae_module.config.scaling_factor, context

    return denoising_loss(unet, encode, scheduler, objective)


def cached_loss(
    unet: nnx.GraphDef, scheduler: SchedulerConfig, objective: ObjectiveConfig, scaling_factor: float
) -> Loss:
    """`denoising_loss` of what `engine.train.latents` keeps: the same numbers, up to float16.

    frozen: {"empty_context": (L, D)}, in the type in which contexts are computed; batch: {"mean", "context"}.
    """

    def encode(frozen, batch, drop):
        empty = frozen["empty_context"]
        context = jnp.where(drop[:, None, None], empty[None], batch["context"].astype(empty.dtype))
        return batch["mean"].astype(jnp.float32) * scaling_factor, context

    return denoising_loss(unet, encode, scheduler, objective)


def denoising_loss(
    unet: nnx.GraphDef, encode: Encode, scheduler: SchedulerConfig, objective: ObjectiveConfig
) -> Loss:
    """The loss of the U-Net's params, see `diffusion_loss`; its metrics are those of `by_timestep`.

    Raises:
      UserError: the objective is wrong, or does not go with the scheduler.
    """
    objective.validate()
    check_terminal(scheduler)
    schedule, build_unet = schedule_for(scheduler), applier(unet)

    def loss(params, frozen, batch, key):
        drop_key, loss_key = jax.random.split(key)
        rows = len(jax.tree.leaves(batch)[0])
        latents, context = encode(
            frozen, batch, jax.random.bernoulli(drop_key, objective.caption_dropout, (rows,))
        )
        module = build_unet(params)

        def apply(x, t):
            return module(x, t, context)

        losses, sigma = diffusion_loss(
            apply, latents, loss_key, schedule, scheduler.prediction_type, objective
        )
        return losses.mean(), by_timestep(losses, sigma, schedule)

    return loss


def over_parts(loss: Loss) -> Loss:
    """A loss of the U-Net's params as one of {"unet": params, ...}."""

    def of_parts(params, frozen, batch, key):
        rest = {**frozen, **params}
        return loss(rest.pop("unet"), rest, batch, key)

    return of_parts
