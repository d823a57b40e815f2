"""What is minimised: functions (params, frozen, batch, key) -> (loss, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, UInt8

from engine.conditions import Told, encoded
from engine.config import AutoencoderStage, ObjectiveConfig
from engine.diffusion.guidance import ContextApply
from engine.diffusion.losses import by_timestep, check_terminal, diffusion_loss
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.diffusion.schedules import schedule_for
from engine.requests import Context
from engine.train.step import Batch, Loss
from engine.types import Latents, Params
from engine.weights.folder import TOKENIZERS


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


# (frozen, batch, which captions are left out) -> what the U-Net is told, and what it learns to draw
Tell = Callable[[Any, Batch, Bool[Array, " B"]], Told]
Encode = Callable[[Any, Batch, Bool[Array, " B"]], tuple[Latents, Told]]


def text_to_image_loss(
    graphdefs: Mapping[str, nnx.GraphDef],
    scheduler: SchedulerConfig,
    objective: ObjectiveConfig,
    zeros: bool = False,
    clip_skip: int = 0,
    control: Callable | None = None,
) -> Loss:
    """`denoising_loss` of what `of_pictures` takes."""
    encode = of_pictures(graphdefs, zeros, clip_skip)
    return denoising_loss(graphdefs["unet"], encode, scheduler, objective, control)


def of_pictures(graphdefs: Mapping[str, nnx.GraphDef], zeros: bool = False, clip_skip: int = 0) -> Encode:
    """Of pictures and captions.

    frozen: params of the other networks and "empty_ids" (L,) or (2, L); batch: {"image", "ids"}, or in place
    of the pictures the "mean" of their latents; of SDXL "sizes" beside them.

    Args:
      graphdefs: of the model's networks: "vae", "text_encoder", and of SDXL "text_encoder_2".
      zeros, clip_skip: see `Model`.
    """
    build_vae, tell = applier(graphdefs["vae"]), of_captions(graphdefs, zeros, clip_skip)

    def encode(frozen, batch, drop):
        vae_module = build_vae(frozen["vae"])
        if "mean" in batch:
            latents = batch["mean"].astype(jnp.float32)
        else:
            mean = vae_module.encode(to_float(batch["image"])).mean  # a draw would be noise to learn
            latents = mean.astype(jnp.float32)
        return latents * vae_module.config.scaling_factor, tell(frozen, batch, drop)

    return encode


def of_captions(graphdefs: Mapping[str, nnx.GraphDef], zeros: bool = False, clip_skip: int = 0) -> Tell:
    """What the U-Net is told of captions alone; everything as in `of_pictures`."""
    readers = [kind for kind in TOKENIZERS if kind in graphdefs]

    def tell(frozen, batch, drop):
        # left out in training is what stands for no prompt in drawing
        ids = batch["ids"] if zeros else _where(drop, frozen["empty_ids"], batch["ids"])
        each = [ids] if len(readers) == 1 else [ids[:, i] for i in range(len(readers))]
        params = {kind: frozen[kind] for kind in readers}
        context = encoded(graphdefs, params, dict(zip(readers, each, strict=True)), clip_skip)
        if zeros:
            context = jax.tree.map(lambda x: _where(drop, jnp.zeros_like(x[0]), x), context)
        return Told(context, numbers(batch))

    return tell


def cached_loss(
    unet: nnx.GraphDef, scheduler: SchedulerConfig, objective: ObjectiveConfig, scaling_factor: float
) -> Loss:
    """`denoising_loss` of what `of_cache` takes."""
    return denoising_loss(unet, of_cache(scaling_factor), scheduler, objective)


def of_cache(scaling_factor: float) -> Encode:
    """Of what `engine.train.latents` keeps: the same numbers, up to float16 and to the type that is computed
    in: the cache is made in float32.

    frozen: {"empty": {"context": (L, D)}}, in the type in which contexts are computed; batch: {"mean",
    "context"}; of SDXL both with "pooled", and the batch with "sizes".
    """

    def encode(frozen, batch, drop):
        told = {name: _where(drop, x, batch[name].astype(x.dtype)) for name, x in frozen["empty"].items()}
        context = Context(told["context"], told.get("pooled"))
        return batch["mean"].astype(jnp.float32) * scaling_factor, Told(context, numbers(batch))

    return encode


def numbers(batch: Batch) -> Float[Array, "B N"] | None:
    """What SDXL is told beside the words."""
    return batch["sizes"].astype(jnp.float32) if "sizes" in batch else None


def _where(drop: Bool[Array, " B"], empty: ArrayLike, each: ArrayLike) -> Array:
    """One for all of the rows that are dropped, each its own for the others."""
    return jnp.where(drop.reshape(-1, *[1] * jnp.ndim(empty)), empty, each)


def denoising_loss(
    unet: nnx.GraphDef,
    encode: Encode,
    scheduler: SchedulerConfig,
    objective: ObjectiveConfig,
    control: Callable | None = None,
) -> Loss:
    """The loss of the U-Net's params, see `diffusion_loss`; its metrics are those of `by_timestep`.

    Args:
      control: (frozen, batch) -> (x, t, words, added) -> what a ControlNet adds; None: there is none.

    Raises:
      UserError: the objective is wrong, or does not go with the scheduler.
    """
    objective.validate()
    check_terminal(scheduler, objective)
    schedule, build_unet = schedule_for(scheduler), applier(unet)

    def loss(params, frozen, batch, key):
        drop_key, loss_key = jax.random.split(key)
        rows = len(jax.tree.leaves(batch)[0])
        latents, told = encode(
            frozen, batch, jax.random.bernoulli(drop_key, objective.caption_dropout, (rows,))
        )
        module = build_unet(params)
        apply = bound(module, control(frozen, batch) if control else None)
        losses, sigma = diffusion_loss(
            lambda x, t: apply(x, t, told), latents, loss_key, schedule, scheduler.prediction_type, objective
        )
        return losses.mean(), by_timestep(losses, sigma, schedule)

    return loss


def bound(unet: nnx.Module, heed: Callable | None = None) -> ContextApply:
    """The U-Net as (x, t, told) -> F. heed: see `engine.train.controlling`."""

    def apply(x: Latents, t: Float[Array, " B"], told: Told) -> Latents:
        added = None if told.numbers is None else (told.context.pooled, told.numbers)
        more = heed(x, t, told.context.words, added) if heed else None
        return unet(x, t, told.context.words, None, added, control=more)

    return apply


def over_parts(loss: Loss) -> Loss:
    """A loss of the U-Net's params as one of {"unet": params, ...}."""

    def of_parts(params, frozen, batch, key):
        rest = {**frozen, **params}
        return loss(rest.pop("unet"), rest, batch, key)

    return of_parts
