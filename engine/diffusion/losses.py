"""Training losses, on the same parameterization that the samplers use."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from engine.diffusion.parameterization import Apply, at_least_float32, coefficients, per_image, target
from engine.diffusion.schedules import Schedule
from engine.types import Latents, UserError

TIME_SAMPLINGS = ("uniform", "logit_normal")


def sample_sigmas(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    schedule: Schedule,
    time_sampling: str,
    mean: float = 0.0,
    std: float = 1.0,
) -> Float[Array, "*B"]:
    """Noise levels to train on, float32.

    Args:
      time_sampling: "uniform" over the training timesteps, or "logit_normal": log sigma ~ N(mean, std^2),
        cut to the table's ends. For a flow, whose sigma is t / (1 - t), that is a logit-normal t (Esser et
        al. 2024, section 3.1); for the others the log-normal sigma of Karras et al. 2022, table 1.
    """
    sigmas = jnp.asarray(schedule.sigmas)
    if time_sampling == "uniform":
        return sigmas[jax.random.randint(key, shape, 0, sigmas.shape[0])]
    if time_sampling == "logit_normal":
        log_sigma = mean + std * jax.random.normal(key, shape)
        return jnp.clip(jnp.exp(log_sigma), sigmas[0], sigmas[-1])
    raise UserError(f"time_sampling={time_sampling!r} is unknown; write one of {', '.join(TIME_SAMPLINGS)}")


def diffusion_loss(
    apply: Apply,
    x0: Latents,
    key: Key[Array, ""],
    schedule: Schedule,
    prediction_type: str,
    time_sampling: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Mean squared error of the network's prediction, in the network's own target.

    Args:
      apply: (x_in, t) -> F, with params and conditioning bound.
      x0: clean latents, of about unit variance.
      key: for the noise levels and the noise.
      time_sampling, mean, std: see `sample_sigmas`.

    Returns:
      The loss of each image, and the sigma that it was taken at, float32.
    """
    x0 = at_least_float32(x0)
    sigma_key, eps_key = jax.random.split(key)
    sigma = sample_sigmas(sigma_key, x0.shape[:1], schedule, time_sampling, mean, std)
    eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
    c_in = coefficients(sigma, prediction_type).c_in
    x = x0 + per_image(sigma, x0) * eps
    F = apply(per_image(c_in, x) * x, schedule.sigma_to_t(sigma))
    error = F.astype(x.dtype) - target(x0, eps, sigma, prediction_type)
    return jnp.mean(error**2, axis=tuple(range(1, x0.ndim))), sigma
