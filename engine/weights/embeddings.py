"""Embeddings of textual inversion (Gal et al. 2022): new words of a model, in files of a few kilobytes.

    {"<my-thing>": (N, D)}   as PyTorch diffusers writes it and its `load_textual_inversion` reads it
    {"emb_params": (N, D)}   as AUTOMATIC1111's web UI does; the word is the file's name
    {"clip_l": (N, D), "clip_g": (N, E)}    the same for SDXL, as kohya's scripts do: for either text encoder

Ours of SDXL say the word in their metadata, so that a file may have any name.

A word of N vectors is N tokens, see engine.text.tokenizer. What a model learns of it are as many rows more in
the table that gives each token of a prompt its vector; of SDXL both text encoders do. Its refiner, which has
the second alone, reads the same files.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from engine.models.clip import LARGEST_ID
from engine.text.tokenizer import Tokenizer
from engine.types import Params, UserError
from engine.weights import names
from engine.weights.component import Component, abstract, listed
from engine.weights.files import PICKLES, new_file
from engine.weights.safetensors_io import DTYPES, Tensor, read_header, read_metadata, read_tensor, write

FILE = "learned_embeds.safetensors"  # in a folder
NAMELESS = "emb_params"
STAR = "*"  # the same, in files that were made of AUTOMATIC1111's
FIRST, SECOND = "clip_l", "clip_g"  # of SDXL; the first alone, of other models
TOKEN = "token"  # in its metadata
TABLE: names.Path = ("text_model", "embeddings", "token_embedding", "embedding")  # of the text encoder


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A word, and the vectors that stand for it."""

    token: str
    vectors: Float[np.ndarray, "N D"]
    vectors_2: Float[np.ndarray, "N E"] | None = None  # of SDXL: for the second text encoder


# ---- files


def save(path: str | Path, embedding: Embedding) -> Path:
    """Writes a file in the format of diffusers, or for SDXL of kohya, whole or not at all; returns its path.

    Args:
      path: FILE.safetensors; anything else is a folder, and the file in it has the name that diffusers gives.

    Raises:
      OSError: no space left, or the place cannot be written.
    """
    path = Path(os.path.expanduser(path))
    path = path if path.suffix == ".safetensors" else path / FILE
    tensors, about = {embedding.token: embedding.vectors}, {}
    if embedding.vectors_2 is not None:
        tensors, about = {FIRST: embedding.vectors, SECOND: embedding.vectors_2}, {TOKEN: embedding.token}
    shapes = {name: array.shape for name, array in tensors.items()}
    with new_file(path) as new:
        write(new, shapes, dict.fromkeys(tensors, np.dtype(np.float32)), tensors.__getitem__, about)
    return path


def find(path: str | Path) -> Path:
    """The file of an embedding: `path`, or the one that diffusers writes into a folder; UserError without."""
    path = Path(os.path.expanduser(path))
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"no embedding {path}: write the path of a .safetensors file, or of a folder with {FILE}"
        )
    if path.name.endswith(PICKLES):
        raise UserError(
            f"{path} is in a format that is never opened because it can run code: convert it with PyTorch, "
            f'safetensors.torch.save_file({{"{NAMELESS}": v}}, "{path.stem}.safetensors"), where v is the '
            f'tensor in torch.load("{path.name}", weights_only=True)'
        )
    return path


def read(path: str | Path) -> Embedding:
    """Reads a file in any of the formats.

    Raises:
      UserError: no file, a broken one, or one that holds something else; in one line.
    """
    path = find(path)
    header = read_header(path)
    both = header.keys() == {FIRST, SECOND}
    # (D,) is what diffusers wrote before words of several vectors
    sound = all(len(each.shape) in (1, 2) and math.prod(each.shape) for each in header.values())
    if not (both or len(header) == 1) or not sound or not all(map(str.strip, header)):
        examples = '{"<my-thing>": (1, 768)}', f'{{"{NAMELESS}": (1, 768)}}'
        raise UserError(
            f"{path} holds no embedding, such as {', '.join(examples)} or of SDXL "
            f'{{"{FIRST}": (1, 768), "{SECOND}": (1, 1280)}}; '
            f"it holds {listed([f'{name} {each.shape}' for name, each in header.items()], 3)}"
        )
    if not both:
        ((key, tensor),) = header.items()
        nameless = key in (NAMELESS, STAR, FIRST)
        return Embedding(path.stem if nameless else key, _vectors(path, key, tensor))
    first, second = (_vectors(path, key, header[key]) for key in (FIRST, SECOND))
    if len(first) != len(second):
        raise UserError(
            f"{path} has {len(first)} vectors in {FIRST} and {len(second)} in {SECOND}, where a word has as "
            "many in either: get another file"
        )
    return Embedding(read_metadata(path).get(TOKEN, path.stem), first, second)


def _vectors(path: Path, key: str, tensor: Tensor) -> Float[np.ndarray, "N D"]:
    if tensor.code not in DTYPES:
        raise UserError(f"{path}: {key} is {tensor.code}; write it as one of {', '.join(DTYPES)}")
    with open(path, "rb") as file:
        vectors = read_tensor(file, key, tensor).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: {key} holds a NaN or an infinity: train it again, or get another file")
    return np.atleast_2d(vectors)


# ---- what a model becomes with them


@dataclasses.dataclass(frozen=True)
class Words:
    """What a text encoder knows beside its own words."""

    tokenizer: Tokenizer  # its own, and these
    ids: list[int]
    vectors: Float[np.ndarray, "N D"]  # of each id
    kind: str = "text_encoder"

    def read_in(self, prompt: str) -> bool:
        """Whether the model reads all of their vectors in a prompt, none of which lies behind its end."""
        return bool(np.isin(self.ids, self.tokenizer.encode([prompt])[0]).all())

    def change(self, name: str, array: np.ndarray) -> np.ndarray:
        """A `component.Change` that puts them into the table of the text encoder."""
        return self.table(array) if name == ".".join((self.kind, *TABLE)) else array

    def table(self, table: np.ndarray) -> np.ndarray:
        """A table (V, D) with these rows in it, and as many more as that takes; in float32."""
        found = np.zeros((max(len(table), max(self.ids) + 1), table.shape[1]), np.float32)
        found[: len(table)] = table
        found[self.ids] = self.vectors
        return found

    def resized(self, text_encoder: Component) -> Component:
        """The text encoder, which has their table, with a config that says so."""
        table = traverse_util.flatten_dict(text_encoder.params)[TABLE]
        config = dataclasses.replace(text_encoder.config, vocab_size=len(table))
        if config.eos_token_id == LARGEST_ID:  # which now is one of these
            config = dataclasses.replace(config, eos_token_id=self.tokenizer.eos_id)
        graphdef, _ = abstract(self.kind, config)
        return dataclasses.replace(text_encoder, config=config, graphdef=graphdef)


def with_rows(params: Params, ids: Sequence[int], vectors: Float[Array, "N D"]) -> Params:
    """A text encoder's params with these vectors in the rows `ids` of its table. Pure."""
    flat = traverse_util.flatten_dict(params)
    flat[TABLE] = jnp.asarray(flat[TABLE]).at[np.array(ids)].set(vectors.astype(flat[TABLE].dtype))
    return traverse_util.unflatten_dict(flat)


def read_all(
    files: Sequence[str | Path], tokenizers: Mapping[str, Tokenizer], widths: Mapping[str, int]
) -> list[Words]:
    """Reads the embeddings of a model: for each of its text encoders what it learns; nothing without any.

    Args:
      tokenizers: the model's own, by text encoder.
      widths: the length of their vectors, D and E.

    Raises:
      UserError: as `read`; or one is for another model, or its word is taken.
    """
    found, xl = [(find(file), read(file)) for file in files], "text_encoder_2" in widths
    for path, embedding in found:
        if (embedding.vectors_2 is None) == xl:
            what = "Stable Diffusion XL, with two text encoders"
            if xl:
                what = f"Stable Diffusion 1 or 2; this one is XL, and takes files with {FIRST} and {SECOND}"
            raise UserError(f"{path} was made for another model: {what}")
    return [_learned(kind, found, tokenizers[kind], width) for kind, width in widths.items() if found]


def _learned(kind: str, found: Sequence[tuple[Path, Embedding]], tokenizer: Tokenizer, width: int) -> Words:
    ids, vectors = [], []
    for path, embedding in found:
        own = embedding.vectors if kind == "text_encoder" else embedding.vectors_2
        if own.shape[1] != width:
            raise UserError(
                f"{path} was made for another model: its vectors have {own.shape[1]} numbers, "
                f"those of this model's words {width}"
            )
        try:
            tokenizer, new = tokenizer.with_token(embedding.token, len(own))
        except UserError as error:
            named = "rename the file" if embedding.token == path.stem else "train it with another placeholder"
            raise UserError(f"{path}: {error}: {named}, and name each file once") from None
        ids += new
        vectors.append(own)
    return Words(tokenizer, ids, np.concatenate(vectors), kind)
