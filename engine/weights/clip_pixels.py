"""A picture as CLIP's image encoder takes it, by preprocessor_config.json: what transformers does with PIL.

Scaled, cropped in the middle, and then, in float32, (x * rescale_factor - image_mean) / image_std.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from engine.config import from_json
from engine.models.layers import check_positive
from engine.types import UserError
from engine.weights.files import read_json

FILE = "preprocessor_config.json"
WHOLE = "processor_config.json"  # what CLIPProcessor of transformers 5 writes: the same in "image_processor"

FIXED = {
    "image_processor_type": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"),
    "feature_extractor_type": ("CLIPFeatureExtractor",),
    "processor_class": (None, "CLIPProcessor"),
    "default_to_square": (False,),
    "data_format": (None, "channels_first"),
    "input_data_format": (None,),
    "do_pad": (None, False),
    "pad_size": (None,),
}
# PIL's, as devices have them
FILTERS = {
    Image.Resampling.BILINEAR: "linear",
    Image.Resampling.BICUBIC: "cubic",
    Image.Resampling.LANCZOS: "lanczos3",
}
# Pictures are RGB already; how a batch is put together.
UNREAD = ("do_convert_rgb", "device", "disable_grouping", "return_tensors")


@dataclasses.dataclass(frozen=True)
class PixelsConfig:
    """preprocessor_config.json, with the names and defaults of transformers. Sizes in pixels."""

    do_resize: bool = True
    size: int | tuple[int, ...] = 224  # of the shorter edge; or height and width, which may stretch
    resample: int = Image.Resampling.BICUBIC.value  # PIL's number of the filter
    do_center_crop: bool = True
    crop_size: tuple[int, ...] = (224, 224)  # height, width
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "PixelsConfig":
        """Reads the object; raises UserError for what the engine does not know."""
        known = {k: v for k, v in options.items() if k not in UNREAD}
        if "size" in known:
            known["size"] = _size(known["size"], f"{where}: size")
        if "crop_size" in known:
            crop = _size(known["crop_size"], f"{where}: crop_size", shortest=False)
            known["crop_size"] = [crop, crop] if isinstance(crop, int) else crop
        return from_json(cls, known, where, FIXED)

    def __post_init__(self):
        check_positive(self, "size", "crop_size")
        for name, values, count in (
            *(("size", self.size, 2), ("crop_size", self.crop_size, 2)),
            *(("image_mean", self.image_mean, 3), ("image_std", self.image_std, 3)),
        ):
            if isinstance(values, tuple) and len(values) != count:
                raise UserError(f"{name}={list(values)}: write {count} numbers")
        if 0 in self.image_std:
            raise UserError(f"image_std={list(self.image_std)}: write numbers other than 0")
        if self.resample not in list(Image.Resampling):
            raise UserError(f"resample={self.resample}: write the number of a filter of PIL; bicubic is 3")

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Height and width of every picture that comes out; None where they depend on what went in."""
        if self.do_center_crop:
            return self.crop_size
        return self.size if self.do_resize and isinstance(self.size, tuple) else None


def _size(value: Any, where: str, shortest: bool = True) -> Any:
    """One number or [height, width], from any spelling of transformers; `shortest`: one edge will do, too."""
    if isinstance(value, (int, list)):
        return value
    if isinstance(value, dict) and value.keys() == {"height", "width"}:
        return [value["height"], value["width"]]
    if shortest and isinstance(value, dict) and value.keys() == {"shortest_edge"}:
        return value["shortest_edge"]
    other = '{"shortest_edge": 224} or ' if shortest else ""
    raise UserError(f'{where}={json.dumps(value)}: write 224, {other}{{"height": 224, "width": 224}}')


def read_pixels_config(folder: Path) -> PixelsConfig:
    """The config in a CLIP's folder; UserError where there is none, or one that the engine does not know."""
    if (folder / FILE).exists():
        return PixelsConfig.from_json(read_json(folder / FILE), str(folder / FILE))
    if not (folder / WHOLE).exists():
        raise UserError(
            f"{folder} has no {FILE}, which says how pictures are scaled: copy it from the model's source"
        )
    options = read_json(folder / WHOLE).get("image_processor")
    if not isinstance(options, dict):
        raise UserError(f"{folder / WHOLE}: image_processor={options!r}: write an object of options")
    return PixelsConfig.from_json(options, f"{folder / WHOLE}: image_processor")


def prepare(picture: UInt8[np.ndarray, "H W 3"], config: PixelsConfig) -> Float[np.ndarray, "h w 3"]:
    """One picture for the image encoder, float32; equal to transformers' CLIPImageProcessorPil bit by bit."""
    picture = fitted(picture, config)
    # The roundings of the original: a product in float64, the rest in float32.
    x = (picture * config.rescale_factor).astype(np.float32) if config.do_rescale else picture
    x = x.astype(np.float32)
    if config.do_normalize:
        x = (x - np.array(config.image_mean, np.float32)) / np.array(config.image_std, np.float32)
    return x


def fitted(picture: UInt8[np.ndarray, "H W 3"], config: PixelsConfig) -> UInt8[np.ndarray, "h w 3"]:
    """The picture as large as the encoder takes it. Of one that is, the same."""
    if config.do_resize:
        height, width = scaled_size(*picture.shape[:2], config.size)
        filtered = Image.fromarray(picture).resize((width, height), Image.Resampling(config.resample))
        picture = np.asarray(filtered)
    if config.do_center_crop:
        for axis, length in enumerate(config.crop_size):
            picture = _centered(picture, axis, length)
    return picture


def prepared(levels: Float[jax.Array, "B H W 3"], config: PixelsConfig) -> Float[jax.Array, "B h w 3"]:
    """`prepare` on devices, of levels from 0 to 255: with a gradient, since they are not rounded on the way.

    Raises:
      UserError: pictures are scaled for this encoder by a filter that devices have not.
    """
    if config.do_resize:
        shape = (len(levels), *scaled_size(*levels.shape[1:3], config.size), 3)
        levels = jax.image.resize(levels, shape, filter_of(config))
    if config.do_center_crop:
        for axis, length in enumerate(config.crop_size, 1):
            levels = _centered(levels, axis, length, jnp.pad)
    if config.do_rescale:
        levels = levels * np.float32(config.rescale_factor)
    if config.do_normalize:
        mean, std = (np.array(each, np.float32) for each in (config.image_mean, config.image_std))
        levels = (levels - mean) / std
    return levels


def filter_of(config: PixelsConfig) -> str:
    """By which devices scale pictures; UserError where they have none such."""
    if config.resample not in FILTERS:
        known = " or ".join(f"{each.value} ({each.name.lower()})" for each in FILTERS)
        raise UserError(f"resample={config.resample}: devices have {known}")
    return FILTERS[Image.Resampling(config.resample)]


def normalized(levels: Float[jax.Array, "*B 3"]) -> Float[jax.Array, "*B 3"]:
    """Levels, 0 to 255, as the encoder of any usual CLIP takes them: the end of `prepare`, on devices."""
    mean, std = (np.array(each, np.float32) for each in (PixelsConfig.image_mean, PixelsConfig.image_std))
    return (levels * np.float32(PixelsConfig.rescale_factor) - mean) / std


def scaled_size(height: int, width: int, size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of pictures after scaling; size: of PixelsConfig.

    An edge that is no whole number of pixels is cut down to one.
    """
    if isinstance(size, tuple):
        return size
    longer = int(size * max(height, width) / min(height, width))
    return (longer, size) if width <= height else (size, longer)


def _centered(picture: Any, axis: int, length: int, pad: Callable = np.pad) -> Any:
    """The middle of an axis, or where it is too short, all of it between zeros. pad: that of its library."""
    missing = length - picture.shape[axis]
    if missing <= 0:
        first = -missing // 2
        return picture[(slice(None),) * axis + (slice(first, first + length),)]
    margins = [(0, 0)] * picture.ndim
    margins[axis] = (missing - missing // 2, missing // 2)
    return pad(picture, margins)
