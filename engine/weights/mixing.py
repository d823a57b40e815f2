"""Models made of others, on the disk, tensor by tensor and in float32: nothing is in memory whole.

    W' = W + sum_i w_i (T_i - W) + (sum_j p_j P_j - sum_k m_k M_k), and LoRAs on top

The first sum goes from a model W towards others (an average of weights: Wortsman et al. 2022, "Model soups";
web UIs call it the weighted sum). The second adds the difference of others, where the p are as much as the m:
what a training from M to P has changed (Ilharco et al. 2023, "Editing models with task arithmetic"). So any
finetuned model becomes one that paints into masks: the inpainting model of its base, plus it, minus its base.
What that one sees beside the noisy picture, the others lack, and it goes on to see as before.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from engine.config import nearest
from engine.types import UserError
from engine.weights import lycoris, names
from engine.weights.arrays import cast
from engine.weights.component import abstract, find_sources, listed, write_config, write_weights
from engine.weights.files import new_folder
from engine.weights.folder import TOKENIZERS, Outline, check_parts_fit, read_outline, write_rest
from engine.weights.index import FILE
from engine.weights.lora import XL_KINDS
from engine.weights.safetensors_io import DTYPES, Tensor, as_dtype, read_tensor

Weighted = Sequence[tuple[str | Path, float]]
FIRST = ("conv_in", "kernel")  # of a U-Net: what sees the picture, and in some models more


class Mixture(NamedTuple):
    """What a model is changed by; see above."""

    toward: Weighted = ()
    plus: Weighted = ()
    minus: Weighted = ()
    loras: Weighted = ()
    parts: Sequence[str] = ()  # the networks that are mixed; none: the U-Net and the text encoders


def write_mixed(
    source: str | Path,
    target: str | Path,
    mixture: Mixture,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the diffusers folder of a model that is made of others, whole or not at all.

    What is no network (tokenizers, scheduler) is the source's, and so are the networks that are no parts of
    the mixture, such as the autoencoder.

    Args:
      source: the folder of W. Those of the others have its layout, and predict what it predicts.
      dtype: float32, float16 or bfloat16; None keeps the type of each tensor of the source.

    Raises:
      UserError: a folder is not sound or of another architecture; `plus` is not as much as `minus`; nothing
        is to be changed; the target exists; a number does not fit into float16.
      OSError: no space left, or the place cannot be written.
    """
    source, target = (Path(os.path.expanduser(path)) for path in (source, target))
    own = read_outline(source)
    check_parts_fit(own.configs, own.tokenizers, source)
    kept = None if dtype is None else as_dtype(dtype)
    if kept is None and not (mixture.toward or mixture.plus or mixture.minus or mixture.loras):
        raise UserError("nothing is to be changed: write what to go toward, to add, or a LoRA, or a dtype")
    _check_difference(mixture)
    changed = _parts(mixture.parts, own, source)
    terms = _terms(mixture)
    _check_not_lost(target, [source, *(term.folder for term in terms), *(path for path, _ in mixture.loras)])
    others = {folder: read_outline(folder) for folder in {term.folder: None for term in terms}}
    for folder, other in others.items():
        _check_alike(own, source, other, folder, changed)
    networks = {}
    for kind, config in own.configs.items():
        used = terms if kind in changed else ()
        beside = [(term, _stored(term.folder, kind, others[term.folder].configs[kind])) for term in used]
        networks[kind] = _stored(source, kind, config), beside
        _check_shapes(*networks[kind], source)
    texts = {kind: config for kind, config in own.configs.items() if kind in XL_KINDS}
    loras = lycoris.read_all(mixture.loras, texts) if mixture.loras else None
    with new_folder(target, FILE, overwrite) as new:
        for kind, config in own.configs.items():
            (new / kind).mkdir()
            write_config(new / kind, kind, config)
            _write(new / kind, *networks[kind], loras, kept, target)
        write_rest(new, own.tokenizers, own.scheduler, own.configs, own.found.zeros)


class _Term(NamedTuple):
    """One of the others: its difference from the source, or itself, times its weight."""

    folder: Path
    weight: float
    toward: bool


def _terms(mixture: Mixture) -> list[_Term]:
    signed = ((1, mixture.toward, True), (1, mixture.plus, False), (-1, mixture.minus, False))
    return [
        _Term(Path(os.path.expanduser(path)), sign * weight, toward)
        for sign, others, toward in signed
        for path, weight in others
    ]


class _Stored(NamedTuple):
    """The weights of a network where they lie."""

    kind: str
    shapes: Mapping[names.Path, jax.ShapeDtypeStruct]
    places: Mapping[names.Path, tuple[Path, str, Tensor]]

    def read(self, path: names.Path) -> np.ndarray:
        """A parameter, in Flax's layout and in the file's type."""
        file, name, tensor = self.places[path]
        with open(file, "rb") as opened:
            return names.to_flax(path, read_tensor(opened, name, tensor), len(self.shapes[path].shape))


def _stored(folder: Path, kind: str, config: Any) -> _Stored:
    sources = find_sources(folder / kind, kind, config)
    places = {path: (file, *found) for file, tensors in sources.items() for path, found in tensors.items()}
    return _Stored(kind, abstract(kind, config)[1], places)


def _write(
    folder: Path,
    base: _Stored,
    others: Sequence[tuple[_Term, _Stored]],
    loras: Any,
    dtype: np.dtype | None,
    target: Path,
) -> None:
    """The weights of a network, mixed one after the other."""
    paths = names.keys(base.shapes)
    dtypes = {key: dtype or DTYPES[base.places[path][2].code] for key, path in paths.items()}

    def tensor(key: str) -> np.ndarray:
        path = paths[key]
        array = base.read(path)
        if others:
            array = _mixed(array.astype(np.float32), [(term, other.read(path)) for term, other in others])
        if loras is not None:
            array = loras(".".join(map(str, (base.kind, *path))), array)
        return cast(names.to_torch(path, array), dtypes[key], f"{target}: {base.kind} {key}")

    write_weights(folder, base.kind, base.shapes, dtypes, tensor)


def _mixed(own: np.ndarray, others: Sequence[tuple[_Term, np.ndarray]]) -> np.ndarray:
    """One parameter. Where a convolution sees more channels than others have, those behind them stay."""
    result, difference = own.copy(), np.zeros((), np.float32)
    for term, array in others:
        if term.toward:
            result += np.float32(term.weight) * (array.astype(np.float32) - own)
        else:
            difference = difference + np.float32(term.weight) * array.astype(np.float32)
    if difference.shape in ((), own.shape):
        return result + difference
    result[:, :, : difference.shape[2]] += difference
    return result


# ---- what cannot be mixed


def _check_not_lost(target: Path, used: Sequence[str | Path]) -> None:
    """UserError where the folder that is to be replaced holds something that the model is made of."""
    for path in (Path(os.path.expanduser(path)) for path in used):
        if target.resolve() in path.resolve().parents:
            raise UserError(f"{target} holds {path}, which it would replace: choose another folder")


def _check_difference(mixture: Mixture) -> None:
    plus, minus = (sum(weight for _, weight in each) for each in (mixture.plus, mixture.minus))
    if abs(plus - minus) > 1e-6 or bool(mixture.plus) != bool(mixture.minus):
        raise UserError(
            f"plus {plus:g} and minus {minus:g}: what is added is the difference of models, as much of those "
            "that are added as of those that are taken away"
        )


def _parts(wanted: Sequence[str], own: Outline, source: Path) -> list[str]:
    """The networks that are mixed."""
    for kind in wanted:
        if kind not in own.configs:
            near = nearest(kind, own.configs)
            raise UserError(f"{source} has no part {kind!r}{near}; write some of {', '.join(own.configs)}")
    return [kind for kind in own.configs if kind in (wanted or {"unet", *TOKENIZERS})]


def _check_alike(own: Outline, source: Path, other: Outline, folder: Path, changed: Sequence[str]) -> None:
    """UserError unless the parts of two models mean the same."""
    if missing := [kind for kind in changed if kind not in other.configs]:
        raise UserError(f"{folder} has no {', '.join(missing)}, as {source} has: leave it out of the parts")
    ours, theirs = own.scheduler.prediction_type, other.scheduler.prediction_type
    if ours != theirs and "unet" in changed:
        raise UserError(f"{folder} predicts {theirs} and {source} {ours}: what is between them is nothing")
    for kind in changed:
        if kind in TOKENIZERS and own.tokenizers[kind].vocabulary != other.tokenizers[kind].vocabulary:
            raise UserError(
                f"{folder}: its {TOKENIZERS[kind]} numbers words otherwise than {source}'s, so that their "
                f"{kind}s do not add up: leave it out of the parts"
            )


def _check_shapes(base: _Stored, others: Sequence[tuple[_Term, _Stored]], source: Path) -> None:
    """UserError unless the parameters are alike, but for channels that a U-Net sees beside the picture."""
    for term, other in others:
        differing = base.shapes.keys() ^ other.shapes.keys()
        for path in base.shapes.keys() & other.shapes.keys():
            ours, theirs = base.shapes[path].shape, other.shapes[path].shape
            narrower = path == FIRST and theirs == (*ours[:2], min(ours[2], theirs[2]), ours[3])
            if ours != theirs and (term.toward or not narrower):
                differing.add(path)
        if differing:
            raise UserError(
                f"{term.folder}: its {base.kind} is not built as that of {source}: they differ in "
                f"{listed(sorted('.'.join(map(str, path)) for path in differing), 5)}"
            )
    firsts = [other.shapes[FIRST] for term, other in others if not term.toward and FIRST in other.shapes]
    if len(widths := sorted({first.shape[2] for first in firsts})) > 1:
        seen = " and ".join(map(str, widths))
        raise UserError(f"what is added to {source} sees {seen} channels, which have no difference")
