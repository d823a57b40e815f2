"""From what a network predicts to the denoiser D(x, sigma) that samplers and losses call.

x = x0 + sigma * eps throughout, in the shape of Karras et al. 2022, equation 7:

    D(x, sigma) = c_skip x + c_out F(c_in x, t(sigma))

With alpha = 1 / sqrt(1 + sigma^2), the network's input is the variance-preserving alpha x0 + alpha sigma eps,
or for a flow model (1 - t) x0 + t eps with t = sigma / (1 + sigma). What F stands for fixes the rest:

    epsilon          F = eps                            x0 = x - sigma F
    v_prediction     F = alpha eps - alpha sigma x0     x0 = alpha^2 x - alpha sigma F
    sample           F = x0                             x0 = F
    flow_prediction  F = eps - x0                       x0 = (1 - t) x - t F

An EDM (Karras et al. 2022, table 1) sees c_in x, with c_in = 1 / sqrt(sigma^2 + sigma_data^2), and tells

    epsilon          x0 = (c_in sigma_data)^2 x + c_in sigma sigma_data F
    v_prediction     x0 = (c_in sigma_data)^2 x - c_in sigma sigma_data F
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from engine.diffusion.schedules import Schedule
from engine.types import Denoise, Latents, Sigma, UserError

# (x_in, t) -> F: a network with its params and conditioning bound. x_in (B H W C), t (B,) float.
Apply = Callable[[Latents, Float[Array, " B"]], Latents]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Coefficients(NamedTuple):
    c_in: Sigma
    c_skip: Sigma
    c_out: Sigma


def coefficients(sigma: Sigma, prediction_type: str) -> Coefficients:
    """c_in, c_skip and c_out of the table above, each of sigma's shape."""
    if prediction_type == "flow_prediction":
        t, one_minus_t = sigma / (1 + sigma), 1 / (1 + sigma)
        return Coefficients(one_minus_t, one_minus_t, -t)
    alpha = 1 / jnp.sqrt(1 + sigma**2)
    match prediction_type:
        case "epsilon":
            return Coefficients(alpha, jnp.ones_like(sigma), -sigma)
        case "v_prediction":
            return Coefficients(alpha, alpha**2, -alpha * sigma)
        case "sample":
            return Coefficients(alpha, jnp.zeros_like(sigma), jnp.ones_like(sigma))
    raise UserError(
        f"prediction_type={prediction_type!r} is not supported; supported: {', '.join(PREDICTION_TYPES)}"
    )


def edm_coefficients(sigma: Sigma, sigma_data: float, prediction_type: str) -> Coefficients:
    """The same of an EDM. What diffusers calls epsilon and v_prediction there differs in the sign alone."""
    c_in = 1 / jnp.sqrt(sigma**2 + sigma_data**2)
    sign = {"epsilon": 1, "v_prediction": -1}[prediction_type]
    return Coefficients(c_in, (c_in * sigma_data) ** 2, sign * c_in * sigma * sigma_data)


def denoiser(apply: Apply, prediction_type: str, schedule: Schedule) -> Denoise:
    """The denoiser of a network: (x (B H W C), sigma () or (B,)) -> x0, float32 whatever the network's dtype.

    Raises:
      UserError: an unknown prediction type.
    """

    def of(sigma: Sigma) -> Coefficients:
        if schedule.sigma_data is None:
            return coefficients(sigma, prediction_type)
        return edm_coefficients(sigma, schedule.sigma_data, prediction_type)

    def denoise(x: Latents, sigma: Sigma) -> Latents:
        x = at_least_float32(x)
        sigma = jnp.asarray(sigma, x.dtype)
        c_in, c_skip, c_out = (per_image(c, x) for c in of(sigma))
        t = jnp.broadcast_to(schedule.sigma_to_t(sigma), x.shape[:1])
        F = apply(c_in * x, t)
        return c_skip * x + c_out * F.astype(x.dtype)

    coefficients(jnp.ones(()), prediction_type)  # an unknown type is reported here, not while sampling
    return denoise


def target(x0: Latents, eps: Latents, sigma: Sigma, prediction_type: str) -> Latents:
    """What the network should have predicted: the F for which D(x0 + sigma eps, sigma) is x0."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    if prediction_type == "flow_prediction":
        return eps - x0
    alpha = per_image(coefficients(sigma, prediction_type).c_in, x0)
    return alpha * eps - alpha * per_image(sigma, x0) * x0


def per_image(value: Float[Array, "*B"], x: Latents) -> Float[Array, "..."]:
    """A scalar as it is, or one value an image shaped to multiply x: (B,) -> (B 1 1 1)."""
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32, or in float64 if that is what it has."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
