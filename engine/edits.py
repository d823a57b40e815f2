"""Pictures that are given beside the words: to start from, to draw a part of anew, to change as told.

They come in as data, which the one way from noise to picture takes up where it is there:

  known  latents of the picture. The sampler starts from them, noised to the sigma that `strength` says, and
         takes the rest of the steps (Meng et al. 2022, SDEdit)
  mask   1 where latents are drawn anew, 0 where the picture stays. There the denoiser knows the answer:
         D' = mask D + (1 - mask) known. The flow towards a constant is a straight line, so that any sampler
         leaves x = known + sigma eps there, which is what others write into x after each step (Lugmayr et al.
         2022, equation 8)
  extra  channels that a U-Net made for it sees beside x: the mask, and the picture without what is drawn anew
         (inpainting, Rombach et al. 2022); or the picture (Brooks et al. 2023, InstructPix2Pix)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from engine.requests import Given, Settings, check_mask, check_pixels
from engine.types import Denoise, Latents, UserError
from engine.weights.folder import Model
from engine.weights.index import FOLLOWS, INPAINTS, WORDS, channels

STRENGTH = 0.8  # of a picture without a mask; what a mask frees is drawn from noise alone
MASKED = 0.5  # of a mask's pixel, from which on it is drawn anew


def made_for(model: Model, where: str) -> str:
    """What the U-Net takes: x alone, and with it a mask and a picture, or a picture.

    Raises:
      UserError: none of these.
    """
    made = channels(model.unet.config, model.vae.config)
    if made is None:
        latent = model.vae.config.latent_channels
        raise UserError(
            f"{where}: the U-Net takes {model.unet.config.in_channels} channels for latents of {latent}; "
            f"known are {latent}, {2 * latent}, {2 * latent + 1}"
        )
    return made


def checked(given: Sequence[Given], made: str, settings: Settings) -> None:
    """UserError where pictures to change are not what the model is made for, or the settings are for."""
    height, width = settings.height, settings.width
    edits = [each for each in given if each.image is not None]
    if settings.strength != 1 and (not edits or made == FOLLOWS):
        why = "a model that starts from noise alone" if edits else "nothing to start from"
        raise UserError(f"strength={settings.strength} with {why}: leave it out")
    if len(edits) not in (0, len(given)):
        raise UserError("some prompts have a picture and others have none: draw them one after the other")
    if edits and settings.larger:
        why = f"hires={settings.hires} is for pictures that are drawn from noise alone, not from a given one"
        raise UserError(f"{why}: leave one of them out, or write --hires 1")
    if not edits:
        if any(each.mask is not None for each in given):
            raise UserError("a mask without a picture: give its image, too")
        if made != WORDS:
            missing = {INPAINTS: "--image FILE --mask FILE", FOLLOWS: "--image FILE"}[made]
            raise UserError(f"this model changes pictures, and there is none: write {missing}")
        return
    if len({edit.mask is None for edit in edits}) > 1:
        raise UserError("some pictures have a mask and others have none: draw them one after the other")
    for edit in edits:
        check_pixels(edit.image, "picture")
        if edit.mask is not None:
            check_mask(edit.mask)
        if edit.image.shape != (height, width, 3):
            raise UserError(f"a picture of shape {edit.image.shape}: it must be {(height, width, 3)}")
        if edit.mask is not None and edit.mask.shape != (height, width):
            raise UserError(f"a mask of shape {edit.mask.shape}: its picture has {(height, width)}")
    if made == INPAINTS and edits[0].mask is None:
        raise UserError("this model fills in a part of a picture, and nothing says which: write --mask FILE")
    if made == FOLLOWS and edits[0].mask is not None:
        raise UserError("this model changes a whole picture, as it is told: leave out --mask")


def default_strength(given: Given, made: str) -> float:
    """1 but for a picture that is drawn over as a whole."""
    return STRENGTH if given.image is not None and given.mask is None and made == WORDS else 1.0


def check_strength(settings: Settings, name: str = "strength") -> None:
    """UserError where it is no share of the steps, or of none; name: of the option that says it."""
    steps, strength = settings.steps, settings.strength
    if not 0 < strength <= 1:
        raise UserError(f"{name}={strength}: write a number above 0 and up to 1")
    if not settings.intervals:
        least = math.ceil(1000 / steps) / 1000
        raise UserError(f"{name}={strength} takes none of {steps} steps: write {least} or more")


def pixels(given: Sequence[Given]) -> dict[str, np.ndarray]:
    """What `looked_at` and `pasted` take: a batch of pictures and of masks, where there are any."""
    return {
        name: np.stack([getattr(each, name) for each in given])
        for name in ("image", "mask")
        if getattr(given[0], name) is not None
    }


def looked_at(vae: nnx.Module, given: dict[str, Array], made: str) -> dict[str, Float[Array, "B h w _"]]:
    """known, mask and extra, see above: those of them that the model needs.

    Latents are the means of their distributions, so that a picture is the same each time. InstructPix2Pix has
    learned from unscaled ones.
    """
    image = given["image"].astype(jnp.float32) / 127.5 - 1
    if made == FOLLOWS:
        return {"extra": vae.encode(image).mean}
    known = {"known": vae.config.scaled(vae.encode(image).mean)}
    if "mask" not in given:
        return known
    anew = given["mask"][..., None] >= MASKED
    mask = _by_cell(anew.astype(jnp.float32), vae.config.scale)
    if made == WORDS:
        return known | {"mask": mask}
    rest = vae.config.scaled(vae.encode(jnp.where(anew, 0.0, image)).mean)
    return known | {"extra": jnp.concatenate([mask, rest], -1)}


def _by_cell(mask: Float[Array, "B H W 1"], scale: int) -> Float[Array, "B h w 1"]:
    """1 for each latent that has a part in what is drawn anew."""
    b, height, width, _ = mask.shape
    return mask.reshape(b, height // scale, scale, width // scale, scale, 1).max((2, 4))


def started(
    noise: Latents, batched: Mapping[str, Any], initial_scale: Array, sigma: Array, anew: Array
) -> Latents:
    """x at the first sigma.

    Args:
      initial_scale: of the noise where it starts alone.
      anew: 1 where strength is 1 and the picture is forgotten but for what a mask keeps; else 0.
    """
    x = initial_scale * noise
    if "known" not in batched:
        return x
    share = anew * batched.get("mask", jnp.ones(()))
    return share * x + (1 - share) * (batched["known"] + sigma * noise)


def seeing(apply: Callable, batched: Mapping[str, Any]) -> Callable:
    """A network (x, t, context) -> F that has the extra channels, if there are any, beside x."""
    if (extra := batched.get("extra")) is None:
        return apply

    def with_extra(x: Latents, t: Array, context: Any) -> Latents:
        # x is a multiple of the batch where there is guidance; those of a picture stand side by side
        seen = jnp.repeat(extra, len(x) // len(extra), axis=0)
        return apply(jnp.concatenate([x, seen.astype(x.dtype)], -1), t, context)

    return with_extra


def keeping(denoise: Denoise, batched: Mapping[str, Any]) -> Denoise:
    """The denoiser that knows what the mask keeps."""
    if "mask" not in batched:
        return denoise
    mask, known = batched["mask"], batched["known"]
    return lambda x, sigma: mask * denoise(x, sigma) + (1 - mask) * known


def pasted(images: UInt8[Array, "B H W 3"], given: dict[str, Array]) -> UInt8[Array, "B H W 3"]:
    """The pictures where the mask is 1, the given ones where it is 0, bit for bit; in between a mixture."""
    mask = given["mask"][..., None]
    return jnp.round(mask * images + (1 - mask) * given["image"]).astype(jnp.uint8)
