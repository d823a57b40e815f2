"""LoRA (Hu et al. 2021, equation 3): the change of a layer as the product of two thin matrices.

    W' = W + scale * (alpha / rank) * B A

A LoRA is data: for each layer that it changes "a" and "b", in the layout of Flax, in which the product is
`a @ b` for Linear and for Conv alike (B is then a convolution of 1x1):

    Linear  (I, O)        a (I, rank)        b (rank, O)
    Conv    (H, W, I, O)  a (H, W, I, rank)  b (1, 1, rank, O)

No model knows of it: what changes are the params that the model is called with.
"""

import dataclasses
import fnmatch
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Key

from engine.config import nearest
from engine.types import Params, UserError
from engine.weights import names
from engine.weights.component import Change, abstract, listed

KINDS = ("unet", "text_encoder")  # the parts of Stable Diffusion 1 and 2 that a LoRA may change
XL_KINDS = (*KINDS, "text_encoder_2")  # those of any model


@dataclasses.dataclass(frozen=True)
class Lora:
    """What a LoRA changes: "unet.mid_block....to_q" -> its two matrices, and its alpha."""

    layers: Params  # name -> {"a": array, "b": array}
    alphas: Mapping[str, float]

    def factor(self, name: str) -> float:
        """alpha / rank."""
        return self.alphas[name] / self.layers[name]["a"].shape[-1]


class Layer(NamedTuple):
    """A layer that a LoRA can change."""

    kind: str
    path: names.Path  # of its kernel
    shape: names.Shape  # in Flax's layout

    def shapes(self, rank: int) -> dict[str, names.Shape]:
        """Of a and b, in Flax's layout."""
        *window, inputs, outputs = self.shape
        return {"a": (*window, inputs, rank), "b": (*[1] * len(window), rank, outputs)}


def layers_of(configs: Mapping[str, Any]) -> dict[str, Layer]:
    """Every Linear and Conv of the models with these configs ("unet", "text_encoder", ...), by its name."""
    return {
        layer_name(kind, path): Layer(kind, path, leaf.shape)
        for kind, config in configs.items()
        for path, leaf in abstract(kind, config)[1].items()
        if path[-1] == "kernel"
    }


def layer_name(kind: str, path: names.Path) -> str:
    """Of a part of the model and the path of a parameter of the layer."""
    return ".".join(map(str, (kind, *path[:-1])))


# ---- made and merged


def fresh(
    key: Key[Array, ""], configs: Mapping[str, Any], targets: Sequence[str], rank: int, alpha: float
) -> Lora:
    """A LoRA that changes nothing yet: A as in PEFT, uniform in +-1 / sqrt(inputs), and B zero.

    The same layer has the same A, whatever other layers are targets. On the host, where nothing is compiled.

    Raises:
      UserError: see `matching`.
    """
    every = layers_of(configs)
    layers = {}
    for name in matching(every, targets):
        shapes = every[name].shapes(rank)
        bound = math.prod(every[name].shape[:-1]) ** -0.5
        rng = np.random.default_rng([*jax.random.key_data(key).tolist(), zlib.crc32(name.encode())])
        a = rng.uniform(-bound, bound, shapes["a"]).astype(np.float32)
        layers[name] = {"a": a, "b": np.zeros(shapes["b"], np.float32)}
    return Lora(layers, dict.fromkeys(layers, float(alpha)))


def matching(layers: Iterable[str], targets: Sequence[str]) -> list[str]:
    """The layers whose names, or whose ends of names, match one of the patterns.

    "to_q" is every layer of that name, "up_blocks.*.to_q" those in the way up, "unet.*" all of the U-Net.

    Raises:
      UserError: a pattern matches nothing; it shows what there is.
    """
    layers, found = list(layers), set()
    for target in targets:
        hits = {name for name in layers if fnmatch.fnmatchcase(f".{name}", f"*.{target}")}
        if not hits:
            ends = sorted({_end(name) for name in layers})
            raise UserError(
                f"LoRA target {target!r} matches no layer{nearest(target, [*ends, *layers])}; "
                f"the names of layers end in {', '.join(ends)}"
            )
        found |= hits
    return [name for name in layers if name in found]


def _end(name: str) -> str:
    """The last part of a name; with the one before where it is a number."""
    return re.search(r"[^.]+(\.\d+)*$", name)[0]


def merged(parts: Mapping[str, Params], lora: Lora, scale: float = 1.0) -> dict[str, Params]:
    """The params of the parts ("unet", ...) with the LoRA in them. Pure; in float32, then cast.

    Raises:
      ValueError: the LoRA changes a layer that is not there.
    """
    missing, result = set(lora.layers), {}
    for kind, params in parts.items():
        flat = traverse_util.flatten_dict(params)
        for path in [path for path in flat if path[-1] == "kernel"]:
            if (name := layer_name(kind, path)) in missing:
                missing.remove(name)
                a, b = (lora.layers[name][side].astype(jnp.float32) for side in "ab")
                change = scale * lora.factor(name) * jnp.matmul(a, b, precision="highest")
                flat[path] = (flat[path].astype(jnp.float32) + change).astype(flat[path].dtype)
        result[kind] = traverse_util.unflatten_dict(flat)
    if missing:
        raise ValueError(f"no such layers: {listed(sorted(missing))}")
    return result


def merged_on_host(parts: Mapping[str, Params], lora: Lora) -> dict[str, Params]:
    """`merged`, of arrays on the host: what is to be split over devices must not be whole on one before."""
    change = merging([(Lora(jax.tree.map(np.asarray, lora.layers), lora.alphas), 1.0)])
    return {
        kind: traverse_util.unflatten_dict(
            {
                path: change(".".join(map(str, (kind, *path))), leaf)
                for path, leaf in traverse_util.flatten_dict(params).items()
            }
        )
        for kind, params in parts.items()
    }


def merging(loras: Sequence[tuple[Lora, float]]) -> Change:
    """`merged` for one parameter after another, on the host, of several LoRAs, each with its scale."""

    def change(name: str, array: np.ndarray) -> np.ndarray:
        layer, _, leaf = name.rpartition(".")
        for lora, scale in loras if leaf == "kernel" else ():
            if layer in lora.layers:
                a, b = (np.asarray(lora.layers[layer][side], np.float32) for side in "ab")
                array = array.astype(np.float32) + np.float32(scale * lora.factor(layer)) * (a @ b)
        return array

    return change
