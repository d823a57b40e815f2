"""What goes through a pipeline: what is asked for, how it is drawn, and what comes out."""

import dataclasses
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8, UInt32

from engine.errors import UserError


class Context(NamedTuple):
    """What the text encoders say of a prompt. A pytree; of a batch, all is behind its axis."""

    words: Float[np.ndarray, "L D"]
    pooled: Float[np.ndarray, " P"] | None = None  # of SDXL: the text as a whole
    refiner: "Context | None" = None  # what those of the refiner say, where there is one
    judged: Float[np.ndarray, " J"] | None = None  # what pictures are judged by, where there is a judge


class OfTheWay(TypedDict, total=False):
    """What may be special on the way from noise to picture; what is left out, or None, is not.

    refiner_start: share of the way, 0 to 1, that the model goes before its refiner; None: 0.8.
    grid: how noise levels are spread, one of schedules.GRIDS; None: as the model's folder says.
    guidance_start, guidance_end: shares of the steps between which there is guidance, 0 to 1; outside,
        a step costs half. None: 0 and 1.
    guidance_rescale: share of the contrast that guidance adds which is taken away again, 0 to 1; models
        that begin at pure noise want 0.7 (engine.diffusion.guidance). None: 0.
    pag_scale: how strictly pictures are led away from what the model makes of them where its pixels do not
        look at each other (Ahn et al. 2024: perturbed-attention guidance); 3 is usual. None: 0.
    pag_layers: blocks or layers of the U-Net in which they do not, with commas between them. None: mid_block.
    cache_interval: steps from one that computes all of the U-Net to the next; those between compute its
        first level alone (engine.diffusion.caching). None: 1.
    merge_tokens: share of the tokens of the finest level, 0 to 0.75, that join others like them where
        pixels attend to each other (engine.models.merging). None: 0.
    control_start, control_end: shares of the steps between which ControlNets add something. None: 0
        and 1.
    hires: how many times as wide and high the picture is drawn over (engine.passes). None, or 1: it is not.
    hires_strength: 0 to 1, how much of it is forgotten then; None: 0.5.
    hires_steps: of the grid for that, of which it takes the share hires_strength; None: `steps`.
    original_size, crop_from, target_size: what SDXL is told of the picture: its size before it was scaled
        and cropped, "WIDTHxHEIGHT", where the crop begins, "LEFT,TOP", and the size behind it. None: the
        picture's own, and 0,0.
    negative_size: the same, of what it is steered away from; None: original_size.
    best_of: candidates of each picture, of which the judge (engine.judging) chooses one. The first picture
        has the index that was asked for, and the one behind it that much more. None: 1.
    """

    refiner_start: float | None
    grid: str | None
    guidance_start: float | None
    guidance_end: float | None
    guidance_rescale: float | None
    pag_scale: float | None
    pag_layers: str | None
    cache_interval: int | None
    merge_tokens: float | None
    control_start: float | None
    control_end: float | None
    hires: float | None
    hires_strength: float | None
    hires_steps: int | None
    original_size: str | None
    crop_from: str | None
    target_size: str | None
    negative_size: str | None
    best_of: int | None


PAG_LAYERS = "mid_block"
HIRES_STRENGTH = 0.5  # how much is forgotten of a picture that is drawn over at a larger size


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to draw, checked and complete."""

    steps: int
    sampler: str
    guidance_scale: float
    height: int
    width: int
    batch_size: int  # pictures a device
    strength: float = 1.0  # of the steps, the share that a given picture takes: the last ones
    grid: str | None = None  # how noise levels are spread; None: as the sampler and the model's folder say
    refiner_start: float | None = None  # share of the way that the model goes before its refiner
    guidance_start: float | None = None  # share of the steps before which there is no guidance; None: 0
    guidance_end: float | None = None  # share of the steps behind which there is none; None: 1
    guidance_rescale: float | None = None  # share of its contrast that guidance gives back; None: 0
    pag_scale: float | None = None  # of the guidance away from perturbed attention; None: 0
    pag_layers: str | None = None  # in which it is perturbed, with commas between them; None: PAG_LAYERS
    cache_interval: int | None = None  # steps from one that computes all of the U-Net to the next; None: 1
    merge_tokens: float | None = None  # share of the finest tokens that attend together with others; None: 0
    control_start: float | None = None  # share of the steps before which ControlNets add nothing; None: 0
    control_end: float | None = None  # share of the steps behind which they add nothing; None: 1
    hires: float | None = None  # times as wide and high that the picture is drawn over; None, 1: not
    hires_strength: float | None = None  # how much of it is forgotten then; None: HIRES_STRENGTH
    hires_steps: int | None = None  # of the grid for that; None: as many as `steps`
    original_size: str | None = None  # what SDXL is told of sizes; None: those of the picture
    crop_from: str | None = None
    target_size: str | None = None
    negative_size: str | None = None
    best_of: int | None = None  # candidates of each picture, of which a judge chooses one; None: 1

    @property
    def candidates(self) -> int:
        """Pictures that are drawn for each that is kept: indices of its seed that are its own."""
        return self.best_of or 1

    @property
    def larger(self) -> "Settings | None":
        """How the picture is drawn over, where it is; see engine.passes."""
        if self.hires in (None, 1):
            return None
        # To multiples of 8, as AUTOMATIC1111's web UI has it, but to the nearest ones.
        sides = {name: round(getattr(self, name) * self.hires / 8) * 8 for name in ("height", "width")}
        strength = HIRES_STRENGTH if self.hires_strength is None else self.hires_strength
        steps = self.steps if self.hires_steps is None else self.hires_steps
        nothing = dict.fromkeys(("hires", "hires_strength", "hires_steps"))
        return dataclasses.replace(self, **sides, strength=strength, steps=steps, **nothing)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels, before an upscaler enlarges them."""
        last = self.larger or self
        return last.height, last.width

    @property
    def intervals(self) -> int:
        """The steps that are taken, as diffusers counts them."""
        return min(int(self.steps * self.strength), self.steps)

    @property
    def guided_steps(self) -> range:
        """Those with guidance, where there is any."""
        start, end = self.guidance_start or 0.0, 1.0 if self.guidance_end is None else self.guidance_end
        return range(round(start * self.steps), round(end * self.steps))

    @property
    def controlled_steps(self) -> range:
        """Those in which ControlNets add something, where there are any.

        As in diffusers, shares are of the steps that are taken, and those are in that lie between them whole.
        """
        count, first = self.intervals, self.steps - self.intervals
        start, end = self.control_start or 0.0, 1.0 if self.control_end is None else self.control_end
        inside = [i for i in range(count) if i / count >= start and (i + 1) / count <= end]
        return range(first + inside[0], first + inside[-1] + 1) if inside else range(0)


def check_scaled(name: str, entries: Any) -> None:
    """UserError for what is no list of files, each with a scale."""
    pairs = isinstance(entries, (list, tuple))
    if not pairs or not all(isinstance(each, (list, tuple)) and len(each) == 2 for each in entries):
        raise UserError(f"{name}={entries!r}: write files and scales, as {name}=[('FILE.safetensors', 0.8)]")


class Given(NamedTuple):
    """Pictures that are given beside the words."""

    image: UInt8[np.ndarray, "H W 3"] | None = None  # to change
    mask: Float[np.ndarray, "H W"] | None = None  # of it; 1: to be drawn anew, 0: stays
    control: tuple[UInt8[np.ndarray, "H W 3"], ...] = ()  # one for each ControlNet that was named
    image_prompt: tuple[np.ndarray, ...] = ()  # (H, W, 3) uint8, one for each IP-Adapter, of any size


def check_pixels(picture: Any, what: str) -> None:
    """UserError for what is given as a picture and is none."""
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        raise UserError(
            f"a {what} of {_kind(picture)}: write an array of uint8, as np.asarray(image.convert('RGB'))"
        )


def check_mask(mask: Any) -> None:
    """UserError for what is no mask."""
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "fb":
        raise UserError(
            f"a mask of {_kind(mask)}: write an array of floats, 0 to 1, as np.asarray(image) / 255"
        )
    if mask.size and not 0 <= mask.min() <= mask.max() <= 1:
        raise UserError(f"a mask from {mask.min()} to {mask.max()}: write numbers from 0 to 1")


def _kind(given: Any) -> str:
    return str(given.dtype) if isinstance(given, np.ndarray) else type(given).__name__


class Request(NamedTuple):
    """One picture: what it shows, and the address of its noise."""

    prompt: str
    negative_prompt: str
    seed: int
    index: int
    guidance_scale: float
    given: Given = Given()
    image_guidance_scale: float = 1.5  # of a model that changes pictures as it is told


class Frames(NamedTuple):
    """Stages on the way of each picture, decoded, from static to picture."""

    noisy: UInt8[np.ndarray, "B N H W 3"]  # the latent at that stage, at unit variance
    denoised: UInt8[np.ndarray, "B N H W 3"]  # what the model makes of it


class Candidates(NamedTuple):
    """Pictures on the devices, one in each place of a batch."""

    images: UInt8[jax.Array, "B H W 3"]
    finite: Bool[jax.Array, " B"]  # which met neither a NaN nor an infinity
    safe: Bool[jax.Array, " B"]  # which a safety checker lets pass, where there is one; else as `finite`
    index: UInt32[jax.Array, " B"]  # of the noise that each began with
    scores: Float[jax.Array, " B"] | None = None  # what the judge says, where there is one


class Finished(NamedTuple):
    """The same, the best of each place: with whatever fills the batch, see `engine.judging.arrived`."""

    images: UInt8[jax.Array | np.ndarray, "B H W 3"]
    finite: Bool[jax.Array | np.ndarray, " B"]
    safe: Bool[jax.Array | np.ndarray, " B"]
    index: UInt32[jax.Array | np.ndarray, " B"]
    scores: Float[jax.Array | np.ndarray, " B"] | None = None
    of: Int32[np.ndarray, " B"] | None = None  # the request that each place is of; None: one after another


class Batch(NamedTuple):
    """Pictures that are done."""

    first: int  # position of the first in the list of prompts
    images: UInt8[np.ndarray, "B H W 3"]
    spoilt: list[int]  # positions in this batch that met a NaN or an infinity,
    unsafe: list[int]  # and of those that the safety checker holds back
    index: list[int]  # of each: with the seed the address of its noise
    scores: Float[np.ndarray, " B"] | None  # what the judge says of each, where there is one
    frames: Frames | None
    heat: Float[np.ndarray, "B h w L"] | None = None  # how much each place attends to each token
