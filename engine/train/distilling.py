"""A LoRA with which a model draws in a few steps (Luo et al. 2023, LCM-LoRA): it is its own teacher."""

import jax
import jax.numpy as jnp
from flax import nnx

from engine.config import DistillConfig, ObjectiveConfig
from engine.diffusion.distillation import distillation_loss
from engine.diffusion.guidance import guided
from engine.diffusion.losses import by_timestep, check_terminal
from engine.diffusion.parameterization import denoiser
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.diffusion.schedules import schedule_for
from engine.train.objectives import Encode, applier, bound
from engine.train.step import Loss
from engine.types import UserError

TEACHER = "teacher"  # the name of the weights without the LoRA, among what is not trained


def distilling_loss(
    unet: nnx.GraphDef, encode: Encode, scheduler: SchedulerConfig, config: DistillConfig
) -> Loss:
    """`distillation_loss` of the U-Net's params; its metrics are those of `by_timestep`.

    frozen: what `encode` needs, and under TEACHER the params of the U-Net as it was.

    Raises:
      UserError: a model with these noise levels has no such steps.
    """
    check_terminal(scheduler, ObjectiveConfig(time_sampling="uniform"))
    if scheduler.is_flow:
        raise UserError("distill: Stable Diffusion 1, 2 and XL are distilled here, and no flows")
    schedule, build = schedule_for(scheduler), applier(unet)
    if scheduler.num_train_timesteps % config.steps:
        raise UserError(
            f"distill.steps={config.steps}: write a number that divides {scheduler.num_train_timesteps}, "
            "such as 50"
        )
    low, high = config.guidance_scale

    def loss(params, frozen, batch, key):
        loss_key, scale_key = jax.random.split(key)
        rows = len(jax.tree.leaves(batch)[0])
        (latents, told), (_, empty) = (
            encode(frozen, batch, jnp.full(rows, left_out)) for left_out in (False, True)
        )
        w = jax.random.uniform(scale_key, (rows,), minval=low, maxval=high)
        own, teacher = bound(build(params)), guided(bound(build(frozen[TEACHER])), told, empty, w)
        losses, sigma = distillation_loss(
            denoiser(lambda x, t: own(x, t, told), scheduler.prediction_type, schedule),
            denoiser(teacher, scheduler.prediction_type, schedule),
            *(latents, loss_key, schedule, config.steps),
        )
        return losses.mean(), by_timestep(losses, sigma, schedule)

    return loss
