"""Consistency distillation (Song et al. 2023), of latents with guidance (Luo et al. 2023, LCM, section 4).

A teacher goes from noise to picture in many small steps. The student learns to say from any place of that way
what is at its end: to say the same at both ends of each step of the teacher's. Then a few jumps suffice
(`engine.diffusion.consistency.lcm`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from engine.diffusion.consistency import consistent
from engine.diffusion.parameterization import at_least_float32, per_image
from engine.diffusion.schedules import Schedule
from engine.types import Denoise, Latents

HUBER = 0.001  # as in its original: all but the smallest differences count by their size, not its square


def step_ends(schedule: Schedule, steps: int) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Noise levels where the teacher's steps begin and end, the cleanest step first.

    They begin at every T / steps of the T timesteps, which `steps` divides; the cleanest ends at timestep 0.
    """
    apart = len(schedule.sigmas) // steps
    begin = apart * np.arange(1, steps + 1) - 1
    sigmas = np.asarray(schedule.sigmas)
    return sigmas[begin], sigmas[np.maximum(begin - apart, 0)]


def distillation_loss(
    student: Denoise,
    teacher: Denoise,
    x0: Latents,
    key: Key[Array, ""],
    schedule: Schedule,
    steps: int,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """How far each image's student is from itself a step of the teacher's further on.

        f(x, t) ~ stop_gradient(f(x', t')),    x' = D + sigma' / sigma (x - D),    D = teacher(x, sigma)

    with f the student's consistency function, and the distance sqrt(d^2 + c^2) - c of each number.

    Args:
      student, teacher: denoisers; the teacher with its guidance.
      x0: clean latents, of about unit variance.
      key: for the noise levels and the noise.
      steps: the teacher's, from pure noise to clean.

    Returns:
      The loss of each image, and the sigma that it was taken at, float32.
    """
    x0 = at_least_float32(x0)
    step_key, eps_key = jax.random.split(key)
    which = jax.random.randint(step_key, x0.shape[:1], 0, steps)
    sigma, sigma_next = (jnp.asarray(ends, x0.dtype)[which] for ends in step_ends(schedule, steps))
    x = x0 + per_image(sigma, x0) * jax.random.normal(eps_key, x0.shape, x0.dtype)
    return loss_at(student, teacher, x, sigma, sigma_next, schedule), sigma


def loss_at(
    student: Denoise,
    teacher: Denoise,
    x: Latents,
    sigma: Float[Array, " B"],
    sigma_next: Float[Array, " B"],
    schedule: Schedule,
) -> Float[Array, " B"]:
    """The same for noisy latents and a step of the teacher's that were drawn."""

    def f(x: Latents, sigma: Float[Array, " B"]) -> Latents:
        return consistent(x, student(x, sigma), sigma, schedule)

    D = teacher(x, sigma)
    x_next = D + per_image(sigma_next / sigma, x) * (x - D)
    goal = f(*jax.lax.stop_gradient((x_next, sigma_next)))
    difference = f(x, sigma) - jax.lax.stop_gradient(goal)
    distance = jnp.sqrt(difference**2 + HUBER**2) - HUBER
    return distance.mean(tuple(range(1, x.ndim)))
