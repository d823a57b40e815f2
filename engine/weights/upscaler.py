"""A network that enlarges pictures, from one safetensors file: the shapes of its weights tell all of it.

It has the keys of BasicSR (`conv_first`, `body.0.rdb1.conv1`, ...), or the older ones of ESRGAN
(`RRDB_trunk.0.RDB1.conv1`, or `model.1.sub.0.RDB1.conv1.0`), see `engine.weights.names`; all keys may begin
with `params_ema.` or `params.`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from engine.models.upscalers import CompactConfig, RRDBConfig, UpscalerConfig, module_of
from engine.types import UserError
from engine.weights import names, network
from engine.weights.files import find_weights
from engine.weights.safetensors_io import Tensor, read_header

KIND = "upscaler"
COLOURS = 3
BLOCK = re.compile(r"body\.(\d+)\.rdb1\.conv1\.weight")
UP = re.compile(r"conv_up(\d)\.weight")
LAYER = re.compile(r"body\.(\d+)\.weight")
KNOWN = "an ESRGAN or Real-ESRGAN (RRDBNet), or a compact one (SRVGGNetCompact)"


def find(path: str | Path) -> Path:
    """The file at `path`; UserError where there is none, or one that is never opened."""
    return find_weights(path, "upscaler", KNOWN, "d.get('params_ema', d.get('params', d))")


def look(path: str | Path) -> network.Found:
    """The network that a file holds.

    Raises:
      UserError: no such file, a pickle, a broken file, or another network; all wrong keys in one line.
    """
    header = read_header(path := find(path))
    config = _config_of(header, path)
    return network.found(KIND, path, header, config, building(config), f"{path} does not hold {KNOWN}")


def building(config: UpscalerConfig) -> network.Build:
    """What makes the module."""
    return lambda rngs: module_of(config)(config, rngs)


def _config_of(header: Mapping[str, Tensor], path: Path) -> UpscalerConfig:
    shapes = {name: header[key].shape for key in header if (name := names.canonical(KIND, key)) is not None}
    try:
        config = _rrdb(shapes) if "conv_first.weight" in shapes else _compact(shapes)
    except (KeyError, ValueError, ZeroDivisionError, IndexError):
        config = None
    # A key of a few bytes must not ask for a network of a million layers.
    if config is None or config.depth > len(header):
        raise UserError(f"{path} does not hold {KNOWN}")
    return config


def _rrdb(shapes: Mapping[str, tuple[int, ...]]) -> RRDBConfig:
    features, channels, *_ = shapes["conv_first.weight"]
    fold = round((channels / COLOURS) ** 0.5)
    blocks = 1 + max(int(found[1]) for found in map(BLOCK.fullmatch, shapes) if found)
    ups = max((int(found[1]) for found in map(UP.fullmatch, shapes) if found), default=0)
    if COLOURS * fold**2 != channels or 2**ups % fold:
        raise ValueError(channels)
    return RRDBConfig(features, shapes["body.0.rdb1.conv1.weight"][0], blocks, ups, fold)


def _compact(shapes: Mapping[str, tuple[int, ...]]) -> CompactConfig:
    features, channels, *_ = shapes["body.0.weight"]
    last = max(int(found[1]) for found in map(LAYER.fullmatch, shapes) if found)
    scale = round((shapes[f"body.{last}.weight"][0] / COLOURS) ** 0.5)
    if channels != COLOURS or COLOURS * scale**2 != shapes[f"body.{last}.weight"][0] or last < 2 or last % 2:
        raise ValueError(channels)
    return CompactConfig(features, last // 2 - 1, scale)
