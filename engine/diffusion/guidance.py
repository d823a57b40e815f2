"""Classifier-free guidance (Ho & Salimans 2022), its rescaling (Lin et al. 2023), and perturbed attention's.

Guidance is applied to the network's prediction F. As D(x, sigma) is affine in F (parameterization.py) and the
weights of the two predictions add up to 1, that equals guiding the denoised images themselves:

    D_uncond + w (D_cond - D_uncond) = c_skip x + c_out [F_uncond + w (F_cond - F_uncond)]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from engine.diffusion.parameterization import Apply, at_least_float32
from engine.types import Latents, Sigma

# (x_in, t, context) -> F: a network with its params bound. x_in (B H W C), t (B,) float, context: (B L D), or
# any tree of arrays of which B is the first axis.
ContextApply = Callable[[Latents, Float[Array, " B"], Any], Latents]


class Perturbed(NamedTuple):
    """A network that is led away from what it makes of a picture without seeing its shape.

    Perturbed-attention guidance (Ahn et al. 2024), beside that by words, as PyTorch diffusers adds the two:

        F(uncond) + w [F(cond) - F(uncond)] + s [F(cond) - F'(cond)]

    F' is the network with its self-attention perturbed.
    """

    apply: Callable[[int], ContextApply]  # by the rows of a picture, of which the last but one is of F'
    scale: float | Float[Array, ""]  # s; may be traced


def guided(
    apply: ContextApply,
    cond: Any,
    uncond: Any,
    guidance_scale: float | Float[Array, ""] | Float[Array, " B"],
    guidance_rescale: float | Float[Array, ""] = 0.0,
    run_uncond: bool = True,
    perturbed: Perturbed | None = None,
) -> Apply:
    """A network steered by `cond` and away from `uncond`: (x_in, t) -> F, float32.

    Both predictions come from one call with twice the batch. The two of an image stand side by side in it, so
    that they are on one device wherever the batch is split.

    Args:
      cond, uncond: contexts of the prompts and of the negative prompts.
      guidance_scale: w above, of all images or one for each. 1 is the conditional prediction alone; may be
        traced.
      guidance_rescale: share, 0 to 1, of the guided prediction that is brought back to the conditional
        one's spread; may be traced.
      run_uncond: static. False leaves out the unconditional pass, which halves the work and is right when
        guidance_scale is 1.
      perturbed: the same network, where it is led away from that, too.
    """
    if not run_uncond and perturbed is None:
        return lambda x, t: at_least_float32(apply(x, t, cond))

    w = guidance_scale[:, None, None, None] if jnp.ndim(guidance_scale) else guidance_scale

    def apply_perturbed(x: Latents, t: Float[Array, " B"]) -> Latents:
        assert perturbed is not None
        sides = (uncond, cond, cond) if run_uncond else (cond, cond)
        rows = len(sides)
        inputs = _together(*[x] * rows), _together(*[t] * rows), _together(*sides)
        F = at_least_float32(perturbed.apply(rows)(*inputs))
        F_cond = F[rows - 1 :: rows]
        away = perturbed.scale * (F_cond - F[rows - 2 :: rows])
        F = F_cond + away + ((w - 1) * (F_cond - F[0::rows]) if run_uncond else 0)
        return _given_back(F, F_cond, guidance_rescale)

    def apply_guided(x: Latents, t: Float[Array, " B"]) -> Latents:
        F = at_least_float32(apply(_together(x, x), _together(t, t), _together(uncond, cond)))
        F_uncond, F_cond = F[0::2], F[1::2]
        F = F_uncond + w * (F_cond - F_uncond)
        return _given_back(F, F_cond, guidance_rescale)

    return apply_perturbed if perturbed else apply_guided


def guided_by_picture(
    apply: ContextApply,
    cond: Any,
    uncond: Any,
    picture: Latents,
    guidance_scale: Float[Array, " B"],
    picture_scale: Float[Array, " B"],
    guidance_rescale: float | Float[Array, ""] = 0.0,
) -> Apply:
    """A network steered by words and by a picture (Brooks et al. 2023, equation 3): (x_in, t) -> F, float32.

        F(none) + w_I [F(picture) - F(none)] + w [F(picture, words) - F(picture)]

    Args:
      apply: its x_in has the channels of `picture` behind those of x; zeros are none.
      guidance_scale, picture_scale: w and w_I.
      guidance_rescale: as in `guided`.
    """
    w, w_picture = (scale[:, None, None, None] for scale in (guidance_scale, picture_scale))

    def apply_guided(x: Latents, t: Float[Array, " B"]) -> Latents:
        seen = picture.astype(x.dtype)
        without, beside = (jnp.concatenate([x, extra], -1) for extra in (jnp.zeros_like(seen), seen))
        F = apply(_together(without, beside, beside), _together(t, t, t), _together(uncond, uncond, cond))
        F_none, F_picture, F_both = (at_least_float32(F)[i::3] for i in range(3))
        F = F_none + w_picture * (F_picture - F_none) + w * (F_both - F_picture)
        return _given_back(F, F_both, guidance_rescale)

    return apply_guided


def within(
    guided: Callable, plain: Callable, low: float | Float[Array, ""], high: float | Float[Array, ""]
) -> Callable:
    """(x, sigma, ...) -> ..., a denoiser or one that keeps something (`engine.diffusion.caching`):
    `guided` where low < sigma <= high, elsewhere `plain` (Kynkäänniemi et al. 2024): at high
    noise levels guidance takes variety away, at low ones it changes little, and it is half the work.

    Args:
      low, high: may be traced, as sigma may: only one of the two is computed.
    """

    def denoise(x: Latents, sigma: Sigma, *rest: Any) -> Any:
        level = jnp.max(sigma)  # a sampler takes a batch through its steps together
        return jax.lax.cond((low < level) & (level <= high), guided, plain, x, sigma, *rest)

    return denoise


def _together(*trees: Any) -> Any:
    """a[0], b[0], ..., a[1], b[1], ... of each leaf."""
    return jax.tree.map(lambda *a: jnp.stack(a, axis=1).reshape(-1, *a[0].shape[1:]), *trees)


def _given_back(F: Latents, F_cond: Latents, guidance_rescale: float | Float[Array, ""]) -> Latents:
    none = isinstance(guidance_rescale, float) and guidance_rescale == 0
    return F if none else rescaled(F, F_cond, guidance_rescale)


def rescaled(F: Latents, F_cond: Latents, guidance_rescale: float | Float[Array, ""]) -> Latents:
    """F, its spread over each image brought towards that of F_cond (Lin et al. 2023, equations 15 and 16)."""
    axes = tuple(range(1, F.ndim))
    ratio = jnp.std(F_cond, axes, keepdims=True) / jnp.std(F, axes, keepdims=True)
    return F * (1 + guidance_rescale * (ratio - 1))
