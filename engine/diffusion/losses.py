"""Training losses, on the same parameterization that the samplers use.

The denoiser's error is the network's, up to a factor: x0 - D = c_out (target - F). So a weighting is a
function of the signal-to-noise ratio alone, w for |x0 - D|^2, and

    loss = w(SNR) |x0 - D|^2 = w(SNR) c_out^2 |target - F|^2,    SNR = 1 / sigma^2

is the same loss whatever the network predicts, flows included (Kingma & Gao 2023). "uniform" is the
exception: 1 in the network's own target, which is what its users mean by no weighting.
"""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from engine.config import ObjectiveConfig
from engine.diffusion.parameterization import Apply, at_least_float32, coefficients, per_image, target
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.diffusion.schedules import Schedule
from engine.errors import UserNotice
from engine.types import Latents, Sigma, UserError

TIME_BINS = 10  # of `by_timestep`


def diffusion_loss(
    apply: Apply,
    x0: Latents,
    key: Key[Array, ""],
    schedule: Schedule,
    prediction_type: str,
    objective: ObjectiveConfig,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The loss of each image at a noise level and with noise of its own.

    Args:
      apply: (x_in, t) -> F, with params and conditioning bound.
      x0: clean latents, of about unit variance.
      key: for the noise levels and the noise.

    Returns:
      The weighted loss of each image, and the sigma that it was taken at, float32.

    Raises:
      UserError: the objective is wrong.
    """
    objective.validate()
    x0 = at_least_float32(x0)
    sigma_key, eps_key = jax.random.split(key)
    sigma = sample_sigmas(sigma_key, x0.shape[:1], schedule, objective)
    eps = sample_eps(eps_key, x0, objective.noise_offset)
    return loss_at(apply, x0, eps, sigma, schedule, prediction_type, objective), sigma


def loss_at(
    apply: Apply,
    x0: Latents,
    eps: Latents,
    sigma: Float[Array, " B"],
    schedule: Schedule,
    prediction_type: str,
    objective: ObjectiveConfig,
) -> Float[Array, " B"]:
    """weight(sigma) * mean (F - target)^2 of each image, for noise levels and noise that were drawn."""
    x = x0 + per_image(sigma, x0) * eps
    c_in = coefficients(sigma, prediction_type).c_in
    F = apply(per_image(c_in, x) * x, schedule.sigma_to_t(sigma))
    error = F.astype(x.dtype) - target(x0, eps, sigma, prediction_type)
    mean = jnp.mean(error**2, axis=tuple(range(1, x.ndim)))
    return weight(sigma, prediction_type, objective) * mean


def sample_sigmas(
    key: Key[Array, ""], shape: tuple[int, ...], schedule: Schedule, objective: ObjectiveConfig
) -> Float[Array, "*B"]:
    """Noise levels to train on, float32.

    "uniform" over the training timesteps, or "logit_normal": log sigma ~ N(time_mean, time_std^2), cut to the
    table's ends. For a flow, whose sigma is t / (1 - t), that is a logit-normal t (Esser et al. 2024, section
    3.1); for the others the log-normal sigma of Karras et al. 2022, table 1.
    """
    sigmas = jnp.asarray(schedule.sigmas)
    if objective.time_sampling == "uniform":
        return sigmas[jax.random.randint(key, shape, 0, sigmas.shape[0])]
    log_sigma = objective.time_mean + objective.time_std * jax.random.normal(key, shape)
    return jnp.clip(jnp.exp(log_sigma), sigmas[0], sigmas[-1])


def sample_eps(key: Key[Array, ""], x0: Latents, offset: float = 0.0) -> Latents:
    """Unit noise, plus `offset` times a normal number for each image and channel, alike at every place.

    The offset teaches a model to move the mean of a picture, which white noise hardly touches (Guttenberg
    2023, "Diffusion with offset noise").
    """
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    if not offset:
        return eps
    shape = (x0.shape[0], *(1,) * (x0.ndim - 2), x0.shape[-1])
    return eps + offset * jax.random.normal(jax.random.fold_in(key, 1), shape, x0.dtype)


def min_snr(snr: Sigma, objective: ObjectiveConfig) -> Sigma:
    """min(SNR, gamma) of |x0 - D|^2 (Hang et al. 2023, section 3.4).

    So min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v, as in that section. Where the
    terminal SNR is zero, the last timestep weighs nothing.
    """
    return jnp.minimum(snr, objective.snr_gamma)


def p2(snr: Sigma, objective: ObjectiveConfig) -> Sigma:
    """1 / (k + SNR)^gamma of |eps - eps_F|^2 = SNR |x0 - D|^2 (Choi et al. 2022, equation 8)."""
    return snr / (objective.p2_k + snr) ** objective.p2_gamma


# name -> weight of |x0 - D|^2, from the SNR; None: 1, of |target - F|^2
WEIGHTINGS: dict[str, Callable[[Sigma, ObjectiveConfig], Sigma] | None] = {
    "uniform": None,
    "min_snr": min_snr,
    "p2": p2,
}


def weight(sigma: Sigma, prediction_type: str, objective: ObjectiveConfig) -> Sigma:
    """What the network's squared error is multiplied by, of sigma's shape."""
    w = WEIGHTINGS[objective.weighting]
    if w is None:
        return jnp.ones_like(sigma)
    return w(1 / sigma**2, objective) * coefficients(sigma, prediction_type).c_out ** 2


def by_timestep(
    losses: Float[Array, " B"], sigma: Float[Array, " B"], schedule: Schedule
) -> dict[str, Float[Array, "..."]]:
    """Sums and counts of the losses in TIME_BINS equal ranges of the timestep, cleanest first.

    Both add up over batches: the sum of the sums over the sum of the counts is the mean loss at a time.
    """
    bins = TIME_BINS * schedule.sigma_to_t(sigma) / schedule.sigmas.shape[0]
    member = jax.nn.one_hot(jnp.clip(bins.astype(int), 0, TIME_BINS - 1), TIME_BINS)
    return {"loss_by_time": losses @ member, "count_by_time": member.sum(0)}


def check_terminal(scheduler: SchedulerConfig, objective: ObjectiveConfig) -> None:
    """Refuses EDMs, and to learn eps where the last timestep is all eps (Lin et al. 2023, section 3.2).

    The network would copy its input there, and x0 = x - sigma eps, of no finite sigma, is not to be had.
    """
    if scheduler.is_edm:
        raise UserError("scheduler: an EDM (Playground 2.5, CosXL) is not trained here")
    if scheduler.rescale_betas_zero_snr and scheduler.prediction_type == "epsilon":
        raise UserError(
            "scheduler: prediction_type='epsilon' cannot learn from pure noise, where rescale_betas_zero_snr "
            "ends: write prediction_type='v_prediction', or rescale_betas_zero_snr=False"
        )
    if scheduler.rescale_betas_zero_snr and objective.time_sampling != "uniform":
        warnings.warn(
            f"time_sampling={objective.time_sampling!r} hardly ever draws the pure noise in which "
            "rescale_betas_zero_snr ends, and from which pictures begin: write time_sampling='uniform'",
            UserNotice,
            stacklevel=2,
        )
