"""The files of a CLIP tokenizer's folder: vocabulary, merges, length and special tokens."""

import json
import pathlib
from typing import Any

from tokenizers import AddedToken, models

from engine.types import UserError

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
# In the order in which transformers adds them to a vocabulary that lacks them.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPECIAL_DEFAULTS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")

Merges = list[tuple[str, str]]


def read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy it from the model that the folder was made from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; copy the file again") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value


def from_backend(backend: dict[str, Any], path: pathlib.Path) -> tuple[dict[str, int], Merges]:
    """(vocab, merges) of tokenizer.json. Merges are pairs, or in older files 'left right'."""
    model = backend.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise UserError(f"{path}: only CLIP's byte-pair encoding is supported (model type BPE)")
    try:
        vocab = {str(token): int(i) for token, i in model["vocab"].items()}
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        return vocab, [(str(left), str(right)) for left, right in pairs]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: vocab or merges are broken ({error!r}); copy the file again") from None


def from_pair(vocab_file: pathlib.Path, merges_file: pathlib.Path) -> tuple[dict[str, int], Merges]:
    for path in (vocab_file, merges_file):
        read_text(path)
    try:
        return models.BPE.read_file(str(vocab_file), str(merges_file))
    except Exception as error:
        raise UserError(f"{vocab_file} or {merges_file.name}: {error}; copy both files again") from None


def check_merges(vocab: dict[str, int], merges: Merges, special: set[str], source: pathlib.Path) -> None:
    """A merges file cut at the end of a line still parses, and would give other ids: find out."""
    made = {left + right for left, right in merges}
    orphans = [
        t for t in vocab if len(t.removesuffix(END_OF_WORD)) > 1 and t not in made and t not in special
    ]
    if orphans:
        raise UserError(
            f"{source}: no merge makes {orphans[0]!r} and {len(orphans) - 1} more of the vocabulary: "
            "the file is incomplete; copy it again"
        )


def length_of(config: dict[str, Any], path: pathlib.Path) -> int:
    length = config.get("model_max_length")
    if not isinstance(length, int) or not 2 < length <= 10**6:
        raise UserError(
            f"{path}: model_max_length={length!r}; write how many tokens the text encoder takes (CLIP: 77)"
        )
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise UserError(f"{path}: {side}={config[side]!r} is not supported; write 'right'")
    return length


def special_tokens(
    folder: pathlib.Path, config: dict[str, Any], backend: dict[str, Any]
) -> tuple[dict[str, str], list[AddedToken]]:
    """Names of the special tokens, and every token found whole in the text, in transformers' order.

    SD 2 pads with '!': as a special token it is id 0 wherever it stands in a prompt, not the id of '!</w>'.
    """
    path = folder / "tokenizer_config.json"
    if config.get("tokenizer_class", "CLIPTokenizer") not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise UserError(f"{path}: {config['tokenizer_class']} is not supported; supported: CLIPTokenizer")
    try:
        named = SPECIAL_DEFAULTS | {n: _token(config[n]) for n in SPECIAL_NAMES if config.get(n)}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        by_id = {int(i): _token(token) for i, token in config.get("added_tokens_decoder", {}).items()}
        if "added_tokens_decoder" not in config:
            path = folder / "special_tokens_map.json"
            older = read_json(path) if path.exists() else {}
            named |= {n: _token(older[n], special=True) for n in SPECIAL_NAMES if older.get(n)}
            extra = older.get("additional_special_tokens") or extra
            path = folder / "added_tokens.json"
            for token, i in (read_json(path) if path.exists() else {}).items():
                special = token in map(_content, named.values())
                by_id[i] = AddedToken(token, normalized=not special, special=special)
            path = folder / "tokenizer.json"
            by_id |= {token["id"]: _token(token) for token in backend.get("added_tokens", [])}
        added = [by_id[i] for i in sorted(by_id)]
        known = {token.content: token for token in added}
        for token in (*(known.get(_content(t), t) for t in named.values()), *map(_token, extra)):
            if _content(token) not in known and token not in added:
                added.append(token)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: the special tokens are broken ({error}); copy the file again") from None
    contents = {name: _content(token) for name, token in named.items()}
    return contents, [_added(token, set(contents.values())) for token in added]


def _token(value: Any, **options: bool) -> str | AddedToken:
    """A token as JSON writes it: a string, or an object with TOKEN_FIELDS."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is neither a string nor an object")
    return AddedToken(**{k: v for k, v in value.items() if k not in ("__type", "id")} | options)


def _content(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else token.content


def _added(token: str | AddedToken, named: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    token.special = token.special or token.content in named
    return token
