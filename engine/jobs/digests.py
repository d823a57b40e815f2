"""What tells the files that pictures are drawn with from others: contents, not places."""

import hashlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from engine.config import GenerateConfig
from engine.requests import Given
from engine.weights import controlnet, decoder, embeddings, ip_adapter, lora_files, safety_checker, upscaler
from engine.weights.files import read_json
from engine.weights.index import FILE

SUFFIXES = (".json", ".safetensors", ".txt")
EDGE = 2**20  # bytes at either end of a file of weights that tell it from others


def of_files(config: GenerateConfig, folder: pathlib.Path) -> dict[str, str]:
    """A digest for the model and for all that is used beside it.

    Args:
      folder: of the model.
    """
    found = {
        "weights": of_weights(folder),
        "lora": of_loras(config.loras()),
        "ip_adapter": _scaled(config.ip_adapters(), ip_adapter.find, _of_ends),
        "image_encoder": _of_encoders(config, folder),
        # the name of a file may be the word that it holds
        "embedding": ", ".join(
            f"{path.name} ({_of(path)})" for path in map(embeddings.find, config.embeddings())
        ),
        "controlnet": _scaled(config.controlnets(), controlnet.find, _of_network),
        "safety_checker": (
            of_weights(safety_checker.find(config.safety_checker)) if config.safety_checker else ""
        ),
        "judge": of_weights(pathlib.Path(config.judge).expanduser()) if config.judge else "",
        "decoder": _of_decoder(decoder.find(config.decoder)) if config.decoder else "",
        "upscaler": _of(upscaler.find(config.upscaler)) if config.upscaler else "",
        "refiner": of_weights(pathlib.Path(config.refiner).expanduser()) if config.refiner else "",
    }
    return {name: told for name, told in found.items() if told}


def of_loras(loras: Iterable[tuple[str, float]]) -> str:
    """The same for LoRAs and their scales."""
    return _scaled(loras, lora_files.find, _of)


def of_given(given: Given) -> dict[str, str]:
    """The same for pictures that are given, at the size that is drawn."""

    def of(pixels: np.ndarray) -> str:
        return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:16]

    found = {"image": given.image, "mask": given.mask}
    told = {name: of(pixels) for name, pixels in found.items() if pixels is not None}
    if given.control:
        told["control_image"] = ", ".join(map(of, given.control))
    if given.image_prompt:
        told["image_prompt"] = ", ".join(map(of, given.image_prompt))
    return told


def _scaled(
    entries: Iterable[tuple[str, float]],
    find: Callable[[str], pathlib.Path],
    mark: Callable[[pathlib.Path], str],
) -> str:
    found = ((find(entry), scale) for entry, scale in entries)
    return ", ".join(f"{path.name}={scale} ({mark(path)})" for path, scale in found)


def _of_encoders(config: GenerateConfig, folder: pathlib.Path) -> str:
    """Of the image encoders that the IP-Adapters read."""
    told = config.image_encoder or None
    files = (ip_adapter.find(file) for file, _ in config.ip_adapters())
    folders = (ip_adapter.find_encoder(file, ip_adapter.config_of(file), told, folder) for file in files)
    return ", ".join(of_weights(each)[:16] for each in folders)


def _of_network(path: pathlib.Path) -> str:
    """Of a folder or a file."""
    return of_weights(path)[:16] if path.is_dir() else _of_ends(path)


def _of_decoder(path: pathlib.Path) -> str:
    """Of a folder, as the jobs that are there remember it, or of a file."""
    return of_weights(path) if path.is_dir() else _of_ends(path)


def _of(path: pathlib.Path) -> str:
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def of_weights(folder: pathlib.Path) -> str:
    """Tells models apart without reading gigabytes: names, sizes and both ends of all files.

    Weights that were trained on differ everywhere, the last tensor in a file included.
    """
    digest = hashlib.sha256()
    for path in _own_files(folder):
        _add_ends(digest, path, path.relative_to(folder).as_posix())
    return digest.hexdigest()


def _own_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Of a model: its index, and those of the parts that it names; else all. A job may lie beside them."""
    found = list(folder.glob("*"))
    if (index := folder / FILE).is_file():
        parts = [folder / name for name in read_json(index)]
        found = [index, *(path for part in parts if part.is_dir() for path in part.rglob("*"))]
    return sorted(path for path in found if path.suffix in SUFFIXES and path.is_file())


def _of_ends(path: pathlib.Path) -> str:
    """The same of one file, whatever its name."""
    digest = hashlib.sha256()
    _add_ends(digest, path, "")
    return digest.hexdigest()[:16]


def _add_ends(digest: Any, path: pathlib.Path, name: str) -> None:
    size = path.stat().st_size
    digest.update(f"{name} {size}\n".encode())
    with open(path, "rb") as file:
        digest.update(file.read(EDGE))
        file.seek(max(size - EDGE, 0))
        digest.update(file.read(EDGE))
