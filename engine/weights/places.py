"""The places of a U-Net in which something attends, and which of them a user names."""

from collections.abc import Sequence
from typing import Any

from engine.models.perturbing import is_in
from engine.models.unet_config import UNetConfig
from engine.types import UserError
from engine.weights.component import abstract

WAY = ("down_blocks", "up_blocks", "mid_block")  # in which order adapters have their layers
TO_WORDS, TO_PIXELS = "attn2", "attn1"


def layers_of(config: UNetConfig, which: str = TO_WORDS) -> list[tuple[str, int]]:
    """The places of the layers that attend to words, or among pixels, and their channels; in WAY's order."""
    _, shapes = abstract("unet", config)
    kernels = {path: shape.shape for path, shape in shapes.items() if path[-3:-1] == (which, "to_k")}
    # With only_cross_attention the first layer of a block attends to words, too.
    found = {path[:-2]: out for path, (wide, out) in kernels.items() if which == TO_WORDS or wide == out}

    def order(path: tuple[Any, ...]) -> tuple[int, list[int]]:
        return WAY.index(path[0]), [part for part in path if isinstance(part, int)]

    return [(".".join(map(str, path)), found[path]) for path in sorted(found, key=order)]


def chosen(option: str, does: str, places: Sequence[str], layers: Sequence[str]) -> list[bool]:
    """Which of the places lie in one of these blocks or layers; UserError where none lies in one of them.

    Args:
      option: that names them.
      does: what is done there, in words.
    """
    for layer in layers:
        if not any(is_in(place, [layer]) for place in places):
            blocks = dict.fromkeys(place.rpartition(".transformer_blocks")[0] for place in places)
            raise UserError(
                f"{option}: this model has no {layer!r} that {does}; it has {', '.join(blocks)}, and what "
                "lies in them or around them"
            )
    return [is_in(place, layers) for place in places]
