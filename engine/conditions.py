"""What the U-Net is told beside the noisy latents: words, and with SDXL the text as a whole and numbers.

SDXL (Podell et al. 2023, section 2) reads a text with two encoders. Each gives the states before its last
layer, and the U-Net attends to them side by side; the second also says what the text is as a whole. Beside
it stand numbers: the size of the picture before it was cropped, where the crop began, and the size that is
drawn; or for the refiner, in place of the last, how beautiful it was found.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from engine.models.attention import Read
from engine.requests import Context, Request, Settings
from engine.types import Params
from engine.weights.folder import Model

BEAUTIFUL, UGLY = 6.0, 2.5  # scores towards and away from which the refiner is steered, as in its original


class Told(NamedTuple):
    """What the U-Net is told of a batch."""

    context: Context
    numbers: Float[Array, "B N"] | None = None  # of SDXL, see above
    read: Read | None = None  # what the U-Net's layers make of the words; None: they have yet to read them
    nets: tuple[Read, ...] = ()  # what those of the ControlNets make of them, if there are any


def params_of(model: Model) -> dict[str, Params]:
    """Of the text encoders."""
    return {kind: part.params for kind, (part, _) in model.readers.items()}


def ids_of(model: Model, prompts: Sequence[str]) -> dict[str, Int32[np.ndarray, "B L"]]:
    """The prompts as each text encoder reads them."""
    return {kind: tokenizer.encode(list(prompts)) for kind, (_, tokenizer) in model.readers.items()}


def encoded(
    graphdefs: Mapping[str, nnx.GraphDef],
    params: Mapping[str, Params],
    ids: Mapping[str, Array],
    clip_skip: int = 0,
) -> Context:
    """What the text encoders of a model say of a batch.

    Args:
      graphdefs, params: of its text encoders at least.
      ids: for each of them.
      clip_skip: see `Model`. What the text is as a whole has all layers.
    """
    build = {kind: nnx.merge(graphdefs[kind], nnx.State(params[kind])) for kind in ids}
    if "text_encoder_2" not in build:
        return Context(build["text_encoder"].context(ids["text_encoder"], clip_skip))
    outputs = [encoder(ids[kind]) for kind, encoder in build.items()]
    words = [output.hidden_states[-2 - clip_skip] for output in outputs]
    return Context(jnp.concatenate(words, -1), outputs[-1].pooled)


def told(model: Model, requests: Sequence[Request], contexts: Any, settings: Settings) -> tuple[Told, Told]:
    """What the U-Net is steered towards, and what away from, of each request.

    Args:
      contexts: from `encoded`, by prompt.
    """
    cond = [contexts[r.prompt]._replace(refiner=None) for r in requests]
    uncond = [contexts[r.negative_prompt]._replace(refiner=None) for r in requests]
    if model.zeros:
        nothing = jax.tree.map(np.zeros_like, cond[0])
        uncond = [u if r.negative_prompt else nothing for u, r in zip(uncond, requests, strict=True)]
    numbers = _numbers(model, len(requests), settings)
    return Told(_stacked(cond), numbers[0]), Told(_stacked(uncond), numbers[1])


def _stacked(contexts: Sequence[Context]) -> Context:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *contexts)


def _numbers(model: Model, count: int, settings: Settings) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Of pictures that were never cropped: towards what, and away from what, the U-Net is steered."""
    if model.text_encoder_2 is None:
        return None, None
    size = (settings.height, settings.width)
    ends = ((BEAUTIFUL,), (UGLY,)) if model.scored else (size, size)
    rows = (np.array([*size, 0, 0, *end], np.float32) for end in ends)
    cond, uncond = (np.tile(row, (count, 1)) for row in rows)
    return cond, uncond
