"""An IP-Adapter that is to go with a model, and the image encoder that it reads: a file, and a folder.

The file has the keys of the original (`image_proj.proj.weight`, `ip_adapter.1.to_k_ip.weight`, ...).
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from engine.models.clip_vision import CLIPVisionConfig
from engine.models.ip_adapter import HEAD, IPAdapter, IPAdapterConfig
from engine.types import UserError
from engine.weights import index, network
from engine.weights.component import Component, Place, load_component, read_config
from engine.weights.files import find_weights
from engine.weights.folder import Model
from engine.weights.places import chosen, layers_of
from engine.weights.safetensors_io import read_header

KIND, ENCODER = "ip_adapter", "image_encoder"
KNOWN = "an IP-Adapter, plain, plus or full"
UNWRAP = "{f'{a}.{k}': v for a, part in d.items() for k, v in part.items()}"  # of the original's pickles
LAYER = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
BLOCK = re.compile(r"image_proj\.layers\.(\d+)\.0\.to_q\.weight")


class Adapter(NamedTuple):
    """One, with what it reads."""

    net: network.Network
    encoder: Component
    scales: tuple[float, ...]  # of what it adds, for each layer; 1 is as trained


def find(path: str | Path) -> Path:
    """The file at `path`; UserError where there is none, or one that is never opened."""
    return find_weights(path, "IP-Adapter", "such as ip-adapter_sd15.safetensors", UNWRAP)


def look(path: str | Path) -> network.Found:
    """The adapter that a file holds.

    Raises:
      UserError: no such file, a pickle, a broken file, or something else; all wrong keys in one line.
    """
    header, config = read_header(path := find(path)), config_of(path)
    build = lambda rngs: IPAdapter(config, rngs)  # noqa: E731
    return network.found(KIND, path, header, config, build, f"{path} does not hold {KNOWN}")


def find_encoder(file: Path, config: IPAdapterConfig, told: str | Path | None, model: Path) -> Path:
    """The folder of the image encoder that an adapter reads.

    Args:
      file, config: of the adapter.
      told: the folder. None: the first that fits of image_encoder beside the file, of the place where the
        originals have it, and of the model's folder.

    Raises:
      UserError: there is none, or one of another size.
    """
    # Links of a cache lead to where nothing lies beside.
    besides = Path(os.path.abspath(file)).parent, file.resolve().parent
    usual = [place / ENCODER for beside in besides for place in (beside, beside.parent / "models")]
    usual.append(model / ENCODER)
    folders = usual if told is None else [Path(os.path.expanduser(told))]
    there = [folder for folder in folders if (folder / "config.json").is_file()]
    wanted = f"an image encoder that says {config.seen} numbers of {_of_what(config)}"
    for folder in there:
        if _says(read_config(folder / "config.json", ENCODER), config) == config.seen:
            return folder
    if there:
        says = _says(read_config(there[0] / "config.json", ENCODER), config)
        raise UserError(
            f"the image encoder {there[0]} says {says}, and the IP-Adapter {file} reads {wanted}: "
            "write --image_encoder FOLDER"
        )
    where = f"{told} has no config.json" if told else f"no folder {ENCODER} beside {file}"
    raise UserError(f"{where}: this IP-Adapter reads {wanted}; write --image_encoder FOLDER")


def load_adapters(
    model: Model,
    each: Sequence[tuple[network.Found, Path, float]],
    layers: Sequence[str] = (),
    dtype: DTypeLike = jnp.float32,
    place: Place | None = None,
) -> list[Adapter]:
    """Reads adapters, by `look`, with their image encoders, by `find_encoder`, and scales.

    Args:
      each: of this model, by `check_fits`.
      layers: names of blocks or layers of the U-Net to which they add something. None: to all.
      dtype, place: as in `load_component`.

    Raises:
      UserError: an encoder is broken, or the U-Net has no such layer.
    """
    places = layers_of(model.unet.config)
    asked = "ip_adapter_layers", "attends to words"
    there = chosen(*asked, [place for place, _ in places], layers or [place for place, _ in places])
    encoders: dict[Path, Component] = {}
    adapters = []
    for found, folder, scale in each:
        if folder not in encoders:
            encoders[folder] = load_component(folder, ENCODER, dtype, place=place)
        scales = tuple(scale if here else 0.0 for here in there)
        adapters.append(Adapter(network.load(found, dtype, place), encoders[folder], scales))
    return adapters


def check_fits(found: network.Found, folder: Path) -> None:
    """UserError unless an adapter was made for the U-Net of the model in a folder; reads its config alone."""
    index.read_index(folder)
    unet = read_config(folder / "unet" / "config.json", "unet")
    widths, words = [width for _, width in layers_of(unet)], unet.per_block("cross_attention_dim")[0]
    if found.config.context != words:
        raise UserError(
            f"the IP-Adapter {found.file} was made for another model: its tokens have {found.config.context} "
            f"numbers, and the words of this one {words}; write one that was made for this model"
        )
    if list(found.config.widths) != widths:
        theirs, ours = map(_counted, (found.config.widths, widths))
        raise UserError(
            f"the IP-Adapter {found.file} was made for another model: it adds to {theirs}, and here are "
            f"{ours}; write one that was made for this model"
        )


def _says(encoder: CLIPVisionConfig, adapter: IPAdapterConfig) -> int:
    """How many numbers the encoder says of what the adapter reads."""
    return encoder.hidden_size if adapter.of_patches else encoder.projection_dim


def _of_what(adapter: IPAdapterConfig) -> str:
    return "each patch" if adapter.of_patches else "a picture"


def _counted(widths: Iterable[int]) -> str:
    widths = list(widths)
    return f"{len(widths)} layers of {min(widths, default=0)} to {max(widths, default=0)} channels"


def config_of(path: Path) -> IPAdapterConfig:
    """What the header of a file tells; UserError as `look`, but for single keys that are wrong."""
    shapes = {key: tensor.shape for key, tensor in read_header(path).items()}
    own = {key.removeprefix("image_proj."): shape for key, shape in shapes.items() if "image_proj." in key}
    if ("norm.weight" in own and "proj.0.weight" in own) or "perceiver_resampler.proj_in.weight" in own:
        raise UserError(f"{path} reads what a recogniser says of faces (FaceID), and there is none here")
    try:
        places = {int(found[1]): shapes[key][0] for key in shapes if (found := LAYER.fullmatch(key))}
        config = _of_way(own, tuple(places[number] for number in sorted(places)))
        if 0 in (config.seen, config.context, *config.widths) or not (config.tokens or config.way == "full"):
            raise ValueError(config)
        return config
    except (KeyError, ValueError, ZeroDivisionError, IndexError):
        raise UserError(f"{path} does not hold {KNOWN}") from None


def _of_way(own: Mapping[str, tuple[int, ...]], widths: tuple[int, ...]) -> IPAdapterConfig:
    if "proj.weight" in own:
        (rows, seen), (context,) = own["proj.weight"], own["norm.weight"]
        return IPAdapterConfig(seen, context, widths, rows // context)
    if "proj.3.weight" in own:
        return IPAdapterConfig(own["proj.0.weight"][1], own["proj.2.weight"][0], widths, 0, "full")
    (_, tokens, hidden), (context,) = own["latents"], own["norm_out.weight"]
    inner, depth = own["layers.0.0.to_q.weight"][0], sum(key.endswith(".0.to_q.weight") for key in own)
    if inner % HEAD:
        raise ValueError(inner)
    seen, wide = own["proj_in.weight"][1], own["layers.0.1.1.weight"][0]
    return IPAdapterConfig(seen, context, widths, tokens, "plus", hidden, depth, inner, wide)
