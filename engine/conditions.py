"""What the U-Net is told beside the noisy latents: words, and with SDXL the text as a whole and numbers.

SDXL (Podell et al. 2023, section 2) reads a text with two encoders. Each gives the states before its last
layer, and the U-Net attends to them side by side; the second also says what the text is as a whole. Beside
it stand numbers: the size of the picture before it was cropped, where the crop began, and the size that is
drawn; or for the refiner, in place of the last, how beautiful it was found.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from engine.config import told_size
from engine.models.attention import Read
from engine.requests import Context, Request, Settings
from engine.text.reading import NOTHING, PLAIN, Part, Reading, parts, text_of
from engine.types import Params
from engine.weights.folder import Model

BEAUTIFUL, UGLY = 6.0, 2.5  # scores towards and away from which the refiner is steered, as in its original

Parts = tuple[Part, ...]  # the same of a prompt as each of the text encoders reads it
Key = tuple[tuple[int, ...], ...]  # its ids


class Told(NamedTuple):
    """What the U-Net is told of a batch."""

    context: Context
    numbers: Float[Array, "B N"] | None = None  # of SDXL, see above
    read: Read | None = None  # what the U-Net's layers make of the words; None: they have yet to read them
    nets: tuple[Read, ...] = ()  # what those of the ControlNets make of them, if there are any
    tokens: tuple[Float[Array, "B T D"], ...] = ()  # of pictures, of each IP-Adapter; until they are read


def params_of(model: Model) -> dict[str, Params]:
    """Of the text encoders."""
    return {kind: part.params for kind, (part, _) in model.readers.items()}


def parts_of(model: Model, prompt: str, reading: Reading) -> list[Parts]:
    """The parts of a prompt, at least one; each as the text encoders of the model read it."""
    each = [parts(prompt, tokenizer, reading) for _, tokenizer in model.readers.values()]
    # Two tokenizers of a model read alike, unless one knows words that the other does not.
    return list(itertools.zip_longest(*each, fillvalue=NOTHING))


def key_of(part: Parts) -> Key:
    """What the text encoders take of a part: equal ones say the same."""
    return tuple(own.ids for own in part)


def ids_of(model: Model, prompts: Sequence[str]) -> dict[str, Int32[np.ndarray, "B L"]]:
    """The prompts as each text encoder reads them, plain."""
    return {kind: tokenizer.encode(list(prompts)) for kind, (_, tokenizer) in model.readers.items()}


def filled(model: Model, keys: Sequence[Key]) -> dict[str, Int32[np.ndarray, "B L"]]:
    """Parts of prompts as each text encoder takes them."""
    return {
        kind: np.stack([tokenizer.filled(key[place]) for key in keys])
        for place, (kind, (_, tokenizer)) in enumerate(model.readers.items())
    }


def joined(model: Model, prompt: Sequence[Parts], contexts: Mapping[Key, Context]) -> Context:
    """What the text encoders say of a prompt: of its parts behind each other, each word with its weight.

    Args:
      contexts: what they say of its parts, and if it has weights of a part without words.
    """
    words = []
    for part in prompt:
        z = contexts[key_of(part)].words
        if has_weights(part):
            z = weighted(z, _weights(model, part), contexts[key_of(empty(part))].words)
        words.append(z)
    return Context(np.concatenate(words), contexts[key_of(prompt[0])].pooled)


def has_weights(part: Parts) -> bool:
    """Whether not all words of it count once."""
    return any(weight != 1 for own in part for weight in own.weights)


def empty(part: Parts) -> Parts:
    """A part of no words."""
    return tuple(NOTHING for _ in part)


def weighted(
    z: Float[np.ndarray, "L D"], w: Float[np.ndarray, "L D"], z_empty: Float[np.ndarray, "L D"]
) -> Float[np.ndarray, "L D"]:
    """z of words that count w times, see engine.text.reading."""
    z32, empty32 = z.astype(np.float32), z_empty.astype(np.float32)
    return np.where(w == 1, z32, empty32 + w * (z32 - empty32)).astype(z.dtype)


def _weights(model: Model, part: Parts) -> Float[np.ndarray, "L D"]:
    """How many times each number counts that the text encoders say of a part; those of no word once."""
    found = []
    for own, (encoder, tokenizer) in zip(part, model.readers.values(), strict=True):
        w = np.ones((tokenizer.model_max_length, encoder.config.hidden_size), np.float32)
        w[1 : len(own.weights) + 1] = np.array(own.weights, np.float32)[:, None]
        found.append(w)
    return np.concatenate(found, -1)


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


def steered_away(model: Model, guidance_scale: float) -> bool:
    """Whether negative prompts are read: not without guidance, nor by a model that has learned it."""
    return guidance_scale != 1 and model.unet.config.time_cond_proj_dim is None


def told(
    model: Model,
    requests: Sequence[Request],
    contexts: Mapping[str, Context],
    settings: Settings,
    reading: Reading = PLAIN,
) -> tuple[Told, Told]:
    """What the U-Net is steered towards, and what away from, of each request.

    Args:
      requests: of prompts, and of negative prompts that are read, which make equally many parts.
      contexts: what the text encoders say, by prompt; where they differ in length, that of "", too.
    """
    away = steered_away(model, settings.guidance_scale)
    texts = [(r.prompt, r.negative_prompt if away else r.prompt) for r in requests]
    longest = max(len(contexts[text].words) for pair in texts for text in pair)
    cond, uncond = ([_filled(contexts, text, longest) for text in side] for side in zip(*texts, strict=True))
    if model.zeros:
        nothing = jax.tree.map(np.zeros_like, cond[0])
        some = [bool(text_of(r.negative_prompt, reading)) for r in requests]
        uncond = [u if there else nothing for u, there in zip(uncond, some, strict=True)]
    numbers = _numbers(model, len(requests), settings)
    return Told(_stacked(cond), numbers[0]), Told(_stacked(uncond), numbers[1])


def _filled(contexts: Mapping[str, Context], prompt: str, length: int) -> Context:
    """The context of a prompt, with as many parts of no words behind it as `length` tokens take."""
    found = contexts[prompt]._replace(refiner=None, judged=None)
    if not (missing := length - len(found.words)):
        return found
    nothing = contexts[""].words
    return found._replace(words=np.concatenate([found.words, *[nothing] * (missing // len(nothing))]))


def _stacked(contexts: Sequence[Context]) -> Context:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *contexts)


def _numbers(model: Model, count: int, settings: Settings) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Towards what, and away from what, the U-Net is steered: unless told otherwise, uncropped pictures."""
    if model.text_encoder_2 is None:
        return None, None
    own = settings.height, settings.width

    def told(name: str, default: tuple[int, int]) -> tuple[int, int]:
        return told_size(name, value) if (value := getattr(settings, name)) else default

    original, crop, target = told("original_size", own), told("crop_from", (0, 0)), told("target_size", own)
    ends = ((BEAUTIFUL,), (UGLY,)) if model.scored else (target, target)
    sizes = original, told("negative_size", original)
    rows = (np.array([*size, *crop, *end], np.float32) for size, end in zip(sizes, ends, strict=True))
    cond, uncond = (np.tile(row, (count, 1)) for row in rows)
    return cond, uncond
