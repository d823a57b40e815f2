"""A T2I-Adapter that is to go with a model: what it was built like, and whether it fits.

Files have the keys of diffusers, or those of the original (github.com/TencentARC/T2I-Adapter), which counts
the residual blocks of all levels through and keeps those of a light adapter level by level:

    adapter.body.1.resnets.0.block1.weight    body.2.block1.weight, of a light one body.1.body.0.block1.weight
    adapter.body.1.in_conv.weight             body.2.in_conv.weight, of a light one body.1.in_conv.weight
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from engine.models.t2i_adapter import FULL, FULL_XL, LIGHT, T2IAdapterConfig
from engine.types import UserError
from engine.weights.folder import Model
from engine.weights.safetensors_io import Tensor

Header = Mapping[str, Tensor]

FIRST = re.compile(r"(adapter\.)?body\.0\.(resnets\.0\.|body\.0\.)?block1\.weight")
RESIDUAL = re.compile(r"body\.(\d+)\.block([12])\.")
PER_LEVEL = 2  # residual blocks, where they are counted through


def is_one(header: Header) -> bool:
    """Whether a file with this header holds an adapter."""
    return any(FIRST.fullmatch(key) for key in header)


def renamed(header: Header) -> Header:
    """The header with the keys of diffusers."""
    if any(key.startswith("adapter.") for key in header):
        return header
    through = "body.0.block1.weight" in header

    def name(key: str) -> str:
        if not through:
            return re.sub(r"^body\.(\d+)\.body\.", r"body.\1.resnets.", key)
        if found := RESIDUAL.match(key):
            level, which = divmod(int(found[1]), PER_LEVEL)
            return f"body.{level}.resnets.{which}.block{found[2]}." + key[found.end() :]
        return re.sub(r"^body\.(\d+)\.", lambda found: f"body.{int(found[1]) // PER_LEVEL}.", key)

    return {f"adapter.{name(key)}": tensor for key, tensor in header.items()}


def config_of(header: Header, model: Model, file: Path) -> T2IAdapterConfig:
    """What the adapter in a file was built like.

    Args:
      header: with the keys of diffusers.

    Raises:
      UserError: it is none, or was made for another model.
    """
    shapes = {key.removeprefix("adapter."): tensor.shape for key, tensor in header.items()}
    light = "conv_in.weight" not in shapes
    last = "out_conv" if light else "resnets.0.block1"
    try:
        first = shapes["body.0.in_conv.weight" if light else "conv_in.weight"][1]
        colours, factor = next((c, f) for c in (3, 1) if c * (f := math.isqrt(first // c)) ** 2 == first)
        channels = [shapes[f"body.{level}.{last}.weight"][0] for level in range(_count(shapes, "body."))]
        blocks = _count(shapes, "body.0.resnets.")
        kinds = (LIGHT,) if light else (FULL, FULL_XL)
        built = [
            T2IAdapterConfig(colours, tuple(channels[: -1 if light else None]), blocks, factor, kind)
            for kind in kinds
        ]
    except (KeyError, IndexError, StopIteration, UserError):
        raise UserError(f"{file} holds no T2I-Adapter that is known") from None
    fitting = next((config for config in built if _fits(config, model)), built[0])
    check_fits(fitting, model, file)
    return fitting


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbers, from 0 on, follow this in the keys."""
    found = {key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)}
    return next(i for i in range(len(found) + 1) if str(i) not in found)


def config_for(model: Model) -> T2IAdapterConfig:
    """Of a new one, which adds to as many levels as one can."""
    widths, scale = model.unet.config.block_out_channels, model.vae.config.scale
    kinds = (FULL, widths, scale), (FULL_XL, (*widths, widths[-1]), 2 * scale)
    known = (
        T2IAdapterConfig(channels=channels[:count], downscale_factor=factor, adapter_type=kind)
        for kind, channels, factor in kinds
        for count in range(1, len(channels) + 1)
        if kind != FULL_XL or len({*channels[2:count]}) < 2
    )
    return max((each for each in known if _fits(each, model)), key=lambda each: len(each.features))


def check_fits(config: T2IAdapterConfig, model: Model, where: Path) -> None:
    """UserError where what it adds does not fit to the U-Net."""
    if not _fits(config, model):
        theirs, ours = (", ".join(f"{c} ({s})" for c, s in each) for each in (config.features, places(model)))
        raise UserError(
            f"the T2I-Adapter {where} was made for another model: it adds channels (pixels a side to each "
            f"place) {theirs}, and here are {ours}; write one that was made for this model"
        )


def _fits(config: T2IAdapterConfig, model: Model) -> bool:
    theirs, ours = config.features, places(model)
    return len(theirs) <= len(ours) and theirs == ours[: len(theirs)]


def places(model: Model) -> tuple[tuple[int, int], ...]:
    """Where it adds, as `T2IAdapterConfig.features` says it: at the end of levels, and in the middle."""
    unet, scale, found = model.unet.config, model.vae.config.scale, []
    last = len(unet.block_out_channels) - 1
    for level, (channels, kind) in enumerate(
        zip(unet.block_out_channels, unet.down_block_types, strict=True)
    ):
        below = level < last and not kind.startswith("CrossAttn")  # see engine.models.unet_blocks
        found.append((channels, scale * 2 ** (level + below)))
    if unet.mid_block_type is not None:
        found.append((unet.block_out_channels[-1], scale * 2**last))
    return tuple(found)
