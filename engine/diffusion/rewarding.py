"""The picture that a model draws, as a function of its weights (Wu et al. 2024, "Deep Reward Supervisions").

A judge says how good the picture is, and its gradient shall reach the network at every step of the way there.
Through all of them it would have to pass the network as often as there are steps: much memory, and gradients
that grow without bounds. With eps_i = (x_i - D_i) / sigma_i the probability flow's first-order steps (DDIM)
only add up,

    x_0 = x_n - sum_i (sigma_i - sigma_i+1) eps_i,

and where what the network is shown is held fixed (their stop_gradient of x_i), each step counts by itself:

    dx_0 / dD_i = (sigma_i - sigma_i+1) / sigma_i

so that some steps of each picture suffice, early ones that place things and late ones that finish them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from engine.diffusion.parameterization import per_image
from engine.diffusion.samplers import sample
from engine.diffusion.steps import Sigmas
from engine.types import Denoise, Latents

States = Float[Array, "N B H W C"]


def drawn(denoise: Denoise, x: Latents, sigmas: Sigmas) -> tuple[Latents, States]:
    """x at the end of N steps, and as it was before each of them.

    Args:
      x: noise at the level sigmas[0].
    """
    keys = jax.random.split(jax.random.key(0), len(x))  # none is used: Euler adds no noise
    x0, trace = sample("euler", denoise, x, sigmas, keys)
    return x0, jnp.concatenate([x[None].astype(x0.dtype), trace.x[:-1]])


def chosen(key: Key[Array, ""], images: int, steps: int, count: int) -> Int[Array, "B K"]:
    """Of each image a step, at random, of each of `count` equal parts of all steps; `count` divides them."""
    part = steps // count
    return part * jnp.arange(count) + jax.random.randint(key, (images, count), 0, part)


def steered(
    denoise: Denoise, x0: Latents, states: States, sigmas: Sigmas, which: Int[Array, "B K"]
) -> Latents:
    """x0 as it is, with the gradient of `denoise` at the chosen steps; they stand for all N.

    Args:
      denoise: of B K images: all choices of the first, all of the second, ... So each stays on its device
        wherever the batch is split.
    """
    at, to = sigmas[which].reshape(-1), sigmas[which + 1].reshape(-1)
    x = jax.vmap(lambda own, steps: own[steps], in_axes=(1, 0))(jax.lax.stop_gradient(states), which)
    D = denoise(x.reshape(-1, *x0.shape[1:]), at)
    share = per_image(len(states) / which.shape[1] * (1 - to / at), D)
    change = share * (D - jax.lax.stop_gradient(D))  # zero, but for its gradient
    return jax.lax.stop_gradient(x0) + change.reshape(x.shape).sum(1)
