"""CLIP's tokenizer on the `tokenizers` library alone: prompts -> ids, read, trained and written.

CLIP (Radford et al. 2021, appendix A) splits lower-cased text into words, maps every byte of a word to
a printable character, and merges the pairs of a byte-pair encoding (Sennrich et al. 2016) whose last
symbol of a word carries `</w>`. Ids are those of transformers' CLIPTokenizer on the same folder.

A token of a textual inversion may stand for several vectors. Each then has an id, whose tokens are called, as
in diffusers, <x>, <x>_1, <x>_2, ...; in a prompt <x> means all of them.
"""

import copy
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.text.tokenizer_files import (
    BOS,
    END_OF_WORD,
    EOS,
    SPECIAL_DEFAULTS,
    TOKEN_FIELDS,
    Merges,
    check_merges,
    from_backend,
    from_pair,
    length_of,
    read_json,
    read_text,
    special_tokens,
)
from engine.types import UserError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # CLIP's ids 0..255: printable bytes first

NORMALIZER = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
)
SPLIT = pre_tokenizers.Split(
    Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
    behavior="removed",
    invert=True,
)


class Tokenizer:
    """Prompts -> ids of fixed length: <|startoftext|>, the words, <|endoftext|>, padding.

    Attributes: bos_id, eos_id, pad_id; model_max_length L; vocab_size (ids are below it); known_words,
    the words that the model saw in training, or None where the folder does not say.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Merges,
        model_max_length: int,
        specials: dict[str, str] | None = None,
        added: Sequence[AddedToken] = (),
        known_words: Iterable[str] | None = None,
    ):
        """Args:
        specials: bos_token, eos_token, unk_token, pad_token, ... where they are not CLIP's.
        added: tokens found whole in the text before it is split, in the order of their ids.
        """
        self.model_max_length = model_max_length
        self.specials = SPECIAL_DEFAULTS | (specials or {})
        self.merges = merges
        self.known_words = None if known_words is None else frozenset(known_words)
        self._bpe = _clip_pipeline(vocab, merges, self.specials["unk_token"])
        self._bpe.add_tokens(list(added) or [AddedToken(t, special=True) for t in self.specials.values()])
        ids = {name: self._bpe.token_to_id(token) for name, token in self.specials.items()}
        self.bos_id, self.eos_id, self.pad_id = ids["bos_token"], ids["eos_token"], ids["pad_token"]
        self._bpe.post_processor = processors.RobertaProcessing(
            (self.specials["eos_token"], self.eos_id),
            (self.specials["bos_token"], self.bos_id),
            trim_offsets=False,
            add_prefix_space=False,
        )
        self._note_added()

    def _note_added(self) -> None:
        """Finds the tokens that are no words of the vocabulary, and those that stand for several vectors."""
        added = {token.content: i for i, token in self._bpe.get_added_tokens_decoder().items()}
        self._learned = {i for token, i in added.items() if token not in self.specials.values()}
        self._several: dict[int, list[int]] = {}
        for token, i in added.items():
            further = itertools.takewhile(added.__contains__, map(f"{token}_{{}}".format, itertools.count(1)))
            if ids := [added[name] for name in further]:
                self._several[i] = [i, *ids]

    @property
    def vocab_size(self) -> int:
        return self._bpe.get_vocab_size()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Each token, with its id."""
        return self._bpe.get_vocab()

    def encode(self, prompts: list[str]) -> Int32[np.ndarray, "B L"]:
        """Ids of each prompt, cut or padded to L = model_max_length, bos and eos included."""
        room = self.model_max_length - 2
        ids = np.empty((len(prompts), self.model_max_length), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[:] = self.filled([i for i, _ in self.tokens(prompt)[:room]])
        return ids

    def filled(self, words: Sequence[int]) -> Int32[np.ndarray, " L"]:
        """At most L - 2 ids with bos before and eos behind them, and then padding."""
        row = np.full(self.model_max_length, self.pad_id, np.int32)
        row[: len(words) + 2] = [self.bos_id, *words, self.eos_id]
        return row

    def tokens(self, prompt: str) -> list[tuple[int, int]]:
        """The ids of a prompt, all of them, and where in it each begins."""
        words = self._words(prompt)
        places = zip(words.ids, words.offsets, strict=True)
        return [(each, start) for i, (start, _) in places for each in self._several.get(i, (i,))]

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """Id and spelling of each token of a text, which ends in `</w>` where a word of the text does."""
        words = self._words(text)
        return list(zip(words.ids, words.tokens, strict=True))

    def unknown_words(self, prompt: str) -> list[str]:
        """Words and symbols of the prompt that the model never saw; [] where the folder has no words.txt."""
        if self.known_words is None:
            return []
        words = self._words(prompt)
        for i, (start, end) in zip(words.ids, words.offsets, strict=True):
            if i in self._learned:
                prompt = prompt[:start] + " " * (end - start) + prompt[end:]
        unknown = (word for word in words_of(prompt) if word not in self.known_words)
        return list(dict.fromkeys(unknown))

    def with_token(self, token: str, vectors: int) -> tuple["Tokenizer", list[int]]:
        """A tokenizer that also knows `token`, and the ids of its vectors: the next that are free.

        As other words, it is the same in small and in capital letters.

        Raises:
          UserError: it, or the name of one of its further vectors, means something already.
        """
        names = [token, *(f"{token}_{i}" for i in range(1, vectors))]
        for name in [*names, f"{token}_{vectors}"]:
            if self._bpe.token_to_id(name) is not None or len(self.pieces(name)) < 2:
                raise UserError(f"the token {name!r} is in the tokenizer already")
        base = token.rpartition("_")[0]
        i = self._bpe.token_to_id(base)
        if i in self._learned and token == f"{base}_{len(self._several.get(i, [i]))}":
            raise UserError(f"the token {token!r} would become a further vector of {base!r}")
        other = copy.copy(self)
        other._bpe = tokenizers.Tokenizer.from_str(self._bpe.to_str())
        other._bpe.add_tokens([AddedToken(name) for name in names])
        other._note_added()
        return other, [other._bpe.token_to_id(name) for name in names]

    def padded_with(self, token: str) -> "Tokenizer":
        """The same tokenizer, which fills prompts up with another token of its vocabulary.

        Like all special tokens, it is then found whole in a text.

        Raises:
          UserError: there is no such token.
        """
        if token == self.specials["pad_token"]:
            return self
        if (i := self._bpe.token_to_id(token)) is None:
            raise UserError(f"the tokenizer has no token {token!r} to fill prompts up with")
        vocab = self._bpe.get_vocab(with_added_tokens=False)
        added = {i: AddedToken(token, special=True)} | self._bpe.get_added_tokens_decoder()
        ordered = [added[each] for each in sorted(added)]
        specials = self.specials | {"pad_token": token}
        return Tokenizer(vocab, self.merges, self.model_max_length, specials, ordered, self.known_words)

    def _words(self, prompt: str) -> tokenizers.Encoding:
        try:
            return self._bpe.encode(prompt, add_special_tokens=False)
        except TypeError:  # lone surrogates: what Python makes of command-line bytes that are no UTF-8
            raise UserError(f"prompt {prompt[:60]!r}: not valid Unicode; write it in UTF-8") from None

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads the tokenizer/ of a diffusers folder: tokenizer.json, or vocab.json and merges.txt.

        tokenizer_config.json says the length and the special tokens, special_tokens_map.json and
        added_tokens.json (older folders) more of them, words.txt the words of the training captions.

        Raises:
          UserError: a file is missing or corrupt, or describes another tokenizer than CLIP's.
        """
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; a model folder has its tokenizer there")
        config = read_json(folder / "tokenizer_config.json")
        whole = folder / "tokenizer.json"
        if whole.exists():
            source, backend = whole, read_json(whole)
            vocab, merges = from_backend(backend, whole)
        else:
            source, backend = folder / "merges.txt", {}
            vocab, merges = from_pair(folder / "vocab.json", source)
        length = length_of(config, folder / "tokenizer_config.json")
        specials, added = special_tokens(folder, config, backend)
        check_merges(vocab, merges, {*specials.values(), *(token.content for token in added)}, source)
        words = folder / "words.txt"
        known = read_text(words).split() if words.exists() else None
        try:
            return cls(vocab, merges, length, specials, added, known)
        except Exception as error:  # the type that the Rust library raises
            reason = str(error).partition("\n")[0]
            raise UserError(f"{source}: not a CLIP tokenizer: {reason}; copy the file again") from None

    def save(self, folder: str | os.PathLike) -> None:
        """Writes all that `load` and transformers' CLIPTokenizer.from_pretrained read."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = sorted(self.vocabulary.items(), key=lambda item: item[1])
        added = {
            str(i): {field: getattr(token, field) for field in TOKEN_FIELDS}
            for i, token in self._bpe.get_added_tokens_decoder().items()
        }
        config = {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            **self.specials,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        files = {
            "tokenizer.json": self._bpe.to_str(pretty=True) + "\n",
            "vocab.json": json.dumps(dict(vocab), ensure_ascii=False) + "\n",
            "merges.txt": "#version: 0.2\n" + merges,
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "special_tokens_map.json": json.dumps(self.specials, indent=2, ensure_ascii=False) + "\n",
        }
        if self.known_words is not None:
            files["words.txt"] = "".join(f"{word}\n" for word in sorted(self.known_words))
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


class Tokenizers(NamedTuple):
    """Those of a model with two text encoders, which read the same captions."""

    each: tuple[Tokenizer, ...]

    def encode(self, prompts: list[str]) -> Int32[np.ndarray, "B N L"]:
        """Ids for each of the encoders."""
        return np.stack([tokenizer.encode(prompts) for tokenizer in self.each], axis=1)


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, model_max_length: int, words: Iterable[str]
) -> Tokenizer:
    """A CLIP tokenizer of at most `vocab_size` ids whose merges fit the captions.

    The vocabulary is CLIP's: 256 bytes, the same at the end of a word, the merges, and the two special
    tokens last. Every text is encodable, and eos is the highest id (CLIP pools at the argmax of the ids).

    Args:
      captions: what the merges are learned from. Few captions may give fewer than `vocab_size` ids.
      words: what `unknown_words` counts as known; phrases are split into their words.

    Raises:
      UserError: vocab_size leaves no room for the bytes and the special tokens.
    """
    room = 2 * len(BYTES) + 2
    if vocab_size < room:
        raise UserError(f"vocab_size={vocab_size} is too small: write at least {room} (bytes and specials)")
    bpe = _clip_pipeline({EOS: 0}, [], EOS)
    ends = [byte + END_OF_WORD for byte in BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        initial_alphabet=BYTES,
        # Ties between pairs go to the lower id: named here, the ends of words get theirs in a fixed order.
        special_tokens=ends,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
    vocab: dict[str, int] = {}
    for symbol in (*BYTES, *ends, *(left + right for left, right in merges)):
        vocab.setdefault(symbol, len(vocab))
    for special in (BOS, EOS):
        vocab[special] = len(vocab)
    known = {word for phrase in words for word in words_of(phrase)}
    return Tokenizer(vocab, merges, model_max_length, known_words=known)


def words_of(text: str) -> list[str]:
    """The words, digits and symbols of a text as CLIP splits it; ASCII punctuation is left out."""
    pieces = (piece for piece, _ in SPLIT.pre_tokenize_str(NORMALIZER.normalize_str(text)))
    whole = (piece for piece in pieces if not (piece[0] == "'" and piece[1:].isalpha()))  # no 's, 't, 're
    printable = ("".join(c for c in piece if c.isprintable()) for piece in whole)
    return [piece for piece in printable if any(c.isalnum() or not c.isascii() for c in piece)]


def _clip_pipeline(vocab: dict[str, int], merges: Merges, unk_token: str) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            fuse_unk=False,
            unk_token=unk_token,
        )
    )
    bpe.normalizer = NORMALIZER
    bpe.pre_tokenizer = pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    return bpe
