"""The tokenizer against transformers' CLIPTokenizer on the same folder, hostile text and broken files."""

import json
import random
import shutil

import numpy as np
import pytest
from transformers import CLIPTokenizer

from engine.text.tokenizer import BOS, BYTES, EOS, Tokenizer, train_tokenizer
from engine.types import UserError

CAPTIONS = [
    f"a {colour} {thing} {place}, {more}"
    for colour in ("red", "scarlet", "tiny", "old")
    for thing in ("fox", "skateboard", "automobile", "lighthouse", "cat's tail")
    for place in ("at sunset", "on the grass", "beside the sea", "under the night sky")
    for more in ("it isn't raining", "they're happy", "3 birds", "a photograph")
]
LENGTH = 20

NASTY = [
    "",
    " ",
    "a red fox at sunset",
    "A  Red\tFOX\n\nat\u2028sunset \u00a0 now",
    "the fox's tail isn't here, they're there, I'm, you'd, we'll, I've 'S 'T ''s",
    "12 345 ½ ² Ⅷ ٣ 3birds",
    "café cafe\u0301 ÅNGSTRÖM A\u030angstro\u0308m İstanbul STRAẞE ﬁ ǅ",
    "a fox 🦊 on a 🛹, 👨‍👩‍👧 🇫🇷 ☔️ 日本語 テスト 한국어 ไทย",
    "مرحبا بالعالم שלום \u202egnp.xof\u202c \u200f\ufeff",
    "nul\0nul \x01\x1f\x7f\x85 end",
    '../../etc/passwd \\ / : * ? " < > |',
    f"a fox {EOS} and {BOS} more {EOS.upper()} <|start",
    "!hello! ! !!! wow!!",
    "fox!?...,,,--- _under_score_ #tag @home &amp; (a:1.3) [b] {c}",
    "\U0010ffff \ufdd0 \ue000 \U000e0041",
    "pneumono" * 40,
    " ".join(f"word{i}" for i in range(500)),
]


def random_prompts(count: int) -> list[str]:
    """Text from all over Unicode, with ASCII, spaces and special tokens in between."""
    rng = random.Random(0)
    planes = [(0, 0x7F), (0x20, 0x7E), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x1FFF), (0x2000, 0x2FFF)]
    planes += [(0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF), (0x1F300, 0x1FAFF)]
    prompts = []
    for _ in range(count):
        low, high = rng.choice(planes)
        letters = [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12))]
        prompts.append("".join(rng.choice((c, c, c, " ", "a", "'s", "!", EOS)) for c in letters))
    return prompts


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 640, LENGTH, words=CAPTIONS)


def old_special(content: str) -> dict:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def write_pair(folder, config: dict, special_map: dict | None, trained: Tokenizer) -> None:
    """vocab.json + merges.txt with the tokenizer_config.json of an older Stable Diffusion folder."""
    trained.save(folder)
    for name in ("tokenizer.json", "special_tokens_map.json", "words.txt"):
        (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH} | config))
    if special_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map))


def older(pad: str) -> tuple[dict, dict]:
    """The two files of Stable Diffusion 1.5 (pad <|endoftext|>) and 2.1 (pad !)."""
    special = {"bos_token": old_special(BOS), "eos_token": old_special(EOS), "unk_token": old_special(EOS)}
    config = {n: token | {"__type": "AddedToken"} for n, token in special.items()}
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "pad_token": pad}
    return config | {"tokenizer_class": "CLIPTokenizer"}, special | {"pad_token": pad}


def numbered(pad: str, vocab: dict[str, int]) -> dict:
    """tokenizer_config.json as transformers 4.40 wrote it."""
    tokens = {pad: False, BOS: True, EOS: True}
    return {
        "added_tokens_decoder": {
            str(vocab[t]): old_special(t) | {"normalized": normalized, "special": True}
            for t, normalized in tokens.items()
        },
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": pad,
        "unk_token": EOS,
        "tokenizer_class": "CLIPTokenizer",
    }


LAYOUTS = [
    "saved",
    "whole_only",
    "bare",
    "sd1",
    "sd2",
    "sd2_numbered",
    "sd2_no_map",
    "added",
    "transformers5",
]


@pytest.fixture(params=LAYOUTS)
def folder(request, trained, tmp_path):
    """A tokenizer/ folder in each of the layouts that are found in the wild."""
    layout = request.param
    vocab = {token: i for i, token in enumerate(BYTES)} | {BOS: trained.bos_id, EOS: trained.eos_id}
    if layout == "saved":
        trained.save(tmp_path)
    elif layout == "whole_only":
        trained.save(tmp_path)
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "words.txt"):
            (tmp_path / name).unlink()
    elif layout == "bare":
        write_pair(tmp_path, {}, None, trained)
    elif layout == "sd1":
        write_pair(tmp_path, *older(EOS), trained)
    elif layout == "sd2":
        write_pair(tmp_path, *older("!"), trained)
    elif layout == "sd2_numbered":
        write_pair(tmp_path, numbered("!", vocab), None, trained)
    elif layout == "sd2_no_map":
        write_pair(tmp_path, older("!")[0], None, trained)
    elif layout == "added":  # a textual inversion's own tokens
        config, special = older(EOS)
        special["additional_special_tokens"] = ["<my-cat>"]
        write_pair(tmp_path, config, special, trained)
        added = {"ollie": trained.vocab_size + 1, "skate": trained.vocab_size}  # not in the order of ids
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    else:
        source = tmp_path / "source"
        source.mkdir()
        write_pair(source, *older("!"), trained)
        CLIPTokenizer.from_pretrained(source).save_pretrained(tmp_path)
        shutil.rmtree(source)
    return tmp_path


def test_ids_equal_those_of_transformers(folder):
    ours, original = Tokenizer.load(folder), CLIPTokenizer.from_pretrained(folder)
    prompts = [*NASTY, *random_prompts(400), "my <my-cat> can skate and ollie"]
    theirs = original(
        prompts,
        padding="max_length",
        max_length=original.model_max_length,
        truncation=True,
        return_tensors="np",
    ).input_ids
    ids = ours.encode(prompts)
    assert ids.dtype == np.int32
    for prompt, row, expected in zip(prompts, ids, theirs, strict=True):
        assert row.tolist() == expected.tolist(), ascii(prompt)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (
        original.bos_token_id,
        original.eos_token_id,
        original.pad_token_id,
        len(original),
    )


def test_saving_what_was_loaded_changes_no_id(folder, tmp_path_factory):
    first = Tokenizer.load(folder)
    copy = tmp_path_factory.mktemp("copy")
    first.save(copy)
    prompts = [*NASTY, *random_prompts(100), "my <my-cat> can skate and ollie"]
    both = [Tokenizer.load(copy)]
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (copy / name).unlink()
    both.append(Tokenizer.load(copy))  # vocab.json and merges.txt alone say the same
    for second in both:
        np.testing.assert_array_equal(first.encode(prompts), second.encode(prompts))
        assert second.vocab_size == first.vocab_size and second.pad_id == first.pad_id


def test_vocabulary_is_laid_out_as_in_clip(trained):
    vocab = trained._bpe.get_vocab()
    by_id = sorted(vocab, key=vocab.get)
    assert sorted(vocab.values()) == list(range(trained.vocab_size))
    assert trained.vocab_size <= 640
    assert by_id[0] == "!" and by_id[256] == "!</w>"  # as in every CLIP vocabulary
    assert by_id[512] == "".join(trained.merges[0])
    assert by_id[-2:] == [BOS, EOS]
    ids = trained.encode(NASTY)
    np.testing.assert_array_equal(ids.argmax(axis=1), [row.tolist().index(trained.eos_id) for row in ids])


def test_every_byte_is_encodable(trained):
    """No prompt but the special token itself may put the unknown token, which is eos, among its words."""
    for prompt in (p for p in [*NASTY, *random_prompts(400)] if EOS not in p.lower()):
        assert trained.eos_id not in trained._words(prompt).ids, ascii(prompt)


def test_frequent_words_become_one_token(trained):
    ids = trained.encode(["red fox at sunset"])[0]
    assert ids[5] == trained.eos_id  # bos and four words
    assert (ids[6:] == trained.pad_id).all()


def test_training_is_deterministic(trained, tmp_path):
    train_tokenizer(iter(CAPTIONS), 640, LENGTH, words=iter(CAPTIONS)).save(tmp_path / "again")
    trained.save(tmp_path / "first")
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_smallest_vocabulary_spells_everything():
    tokenizer = train_tokenizer(CAPTIONS, 514, LENGTH, words=[])
    assert tokenizer.vocab_size == 514 and tokenizer.merges == []
    assert tokenizer.encode(["ab"])[0, :4].tolist() == [512, BYTES.index("a"), 256 + BYTES.index("b"), 513]
    with pytest.raises(UserError, match="at least 514"):
        train_tokenizer(CAPTIONS, 513, LENGTH, words=[])


def test_unknown_words(trained, tmp_path):
    assert trained.unknown_words("A red FOX at sunset, isn't it?!") == []
    assert trained.unknown_words("a zebra, the Zebra and 7 \N{FOX FACE}s; RED\0") == [
        "zebra",
        "and",
        "7",
        "🦊",
        "s",
    ]
    assert trained.unknown_words("\u202efox\u200b \x1b[31m") == ["1", "m"]
    assert trained.unknown_words("the cat's 'zebra' they'd 'ed") == ["zebra", "ed"]
    trained.save(tmp_path)
    assert Tokenizer.load(tmp_path).known_words == trained.known_words
    (tmp_path / "words.txt").unlink()
    assert Tokenizer.load(tmp_path).unknown_words("a zebra") == []  # a CLIP that read the whole web


def test_bytes_that_are_no_text_are_refused(trained):
    with pytest.raises(UserError, match="UTF-8"):
        trained.encode([b"fox \xff".decode("utf-8", "surrogateescape")])


def test_no_prompts_no_rows(trained):
    assert trained.encode([]).shape == (0, LENGTH)


def shorten(path):
    path.write_text(path.read_text()[: len(path.read_text()) // 2].rsplit("\n", 1)[0] + "\n")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BREAK = {
    "no config": (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    "no vocab": (lambda f: (f / "vocab.json").unlink(), "vocab.json is missing"),
    "no merges": (lambda f: (f / "merges.txt").unlink(), "merges.txt is missing"),
    "cut vocab": (lambda f: (f / "vocab.json").write_text('{"a": 0, "b'), "vocab.json"),
    "vocab is a list": (lambda f: (f / "vocab.json").write_text("[1, 2]"), "vocab.json"),
    "cut merges": (lambda f: shorten(f / "merges.txt"), "merges.txt.*incomplete"),
    "broken merge": (lambda f: (f / "merges.txt").write_text("#version: 0.2\na\n"), "merges.txt"),
    "other vocab": (lambda f: (f / "vocab.json").write_text('{"a": 0}'), "merges.txt"),
    "binary": (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe\x80"), "merges.txt.*cannot be read"),
    "config no json": (
        lambda f: (f / "tokenizer_config.json").write_text("{"),
        "config.json: not valid JSON",
    ),
    "deep json": (lambda f: (f / "tokenizer_config.json").write_text("[" * 10**6), "config.json: not valid"),
    "config a list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "object was expected"),
    "no length": (lambda f: edit(f / "tokenizer_config.json", model_max_length=None), "CLIP: 77"),
    "endless": (lambda f: edit(f / "tokenizer_config.json", model_max_length=10**30), "CLIP: 77"),
    "left": (
        lambda f: edit(f / "tokenizer_config.json", padding_side="left"),
        "padding_side='left'.*write 'right'",
    ),
    "t5": (lambda f: edit(f / "tokenizer_config.json", tokenizer_class="T5Tokenizer"), "T5Tokenizer is not"),
    "special": (lambda f: edit(f / "tokenizer_config.json", pad_token=7), "special tokens are broken"),
    "decoder": (
        lambda f: edit(f / "tokenizer_config.json", added_tokens_decoder={"x": {}}),
        "special tokens",
    ),
}


@pytest.mark.parametrize("case", BREAK)
def test_broken_folders_name_the_file(trained, tmp_path, case):
    trained.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    spoil, message = BREAK[case]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


BREAK_WHOLE = {
    "cut": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "unigram": (lambda text: text.replace('"type": "BPE"', '"type": "Unigram"'), "byte-pair"),
    "no model": (lambda text: '{"added_tokens": []}', "byte-pair"),
    "no vocab": (lambda text: '{"model": {"type": "BPE", "merges": []}}', "vocab or merges are broken"),
    "bad merges": (
        lambda text: '{"model": {"vocab": {"a": 0}, "merges": ["a"]}}',
        "vocab or merges are broken",
    ),
    "alien": (lambda text: '{"model": {"vocab": {"a": 0}, "merges": ["b c"]}}', "not a CLIP tokenizer"),
    "negative": (lambda text: '{"model": {"vocab": {"a": -1}, "merges": []}}', "vocab or merges|not a CLIP"),
}


@pytest.mark.parametrize("case", BREAK_WHOLE)
def test_broken_tokenizer_json(trained, tmp_path, case):
    trained.save(tmp_path)
    spoil, message = BREAK_WHOLE[case]
    path = tmp_path / "tokenizer.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and "tokenizer.json" in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Tokenizer.load(tmp_path / "tokenizer")
