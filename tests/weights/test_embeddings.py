"""Embeddings of textual inversion: their files, and what a model becomes with them. PyTorch: tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import engine
from engine.types import UserError
from engine.weights import embeddings, lora, lora_files
from engine.weights.embeddings import TABLE, Embedding
from engine.weights.folder import load_folder, save_folder
from tests.compiled import COMPILED
from tests.tiny import REFINER, XL, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

WIDTH = 24  # of the tiny text encoder


def vectors(count: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width), np.float32)


def table(model) -> np.ndarray:
    return np.asarray(traverse_util.flatten_dict(model.text_encoder.params)[TABLE])


# ---- files


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_saved_is_read(tmp_path, count):
    saved = Embedding("<my-thing>", vectors(count))
    file = embeddings.save(tmp_path / "folder", saved)
    assert file == tmp_path / "folder" / "learned_embeds.safetensors"
    assert {key: array.shape for key, array in load_file(file).items()} == {"<my-thing>": (count, WIDTH)}
    for path in (file, file.parent):
        read = embeddings.read(path)
        assert read.token == "<my-thing>"
        np.testing.assert_array_equal(read.vectors, saved.vectors)
    assert embeddings.save(tmp_path / "a.safetensors", saved).read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_of_sdxl_a_file_says_its_word_whatever_its_name(tmp_path):
    saved = Embedding("<my-thing>", vectors(2), vectors(2)[:, :20])
    file = embeddings.save(tmp_path / "other.safetensors", saved)
    assert set(load_file(file)) == {"clip_l", "clip_g"}  # the names that others read
    read = embeddings.read(file)
    assert read.token == "<my-thing>"
    np.testing.assert_array_equal(read.vectors, saved.vectors)
    np.testing.assert_array_equal(read.vectors_2, saved.vectors_2)


def test_other_formats_that_are_read(tmp_path):
    save_file({"emb_params": vectors(2)}, tmp_path / "my-style.safetensors")  # AUTOMATIC1111
    save_file({"<old>": vectors(1)[0].astype(np.float16)}, tmp_path / "old.safetensors")
    style, old = (embeddings.read(tmp_path / f"{name}.safetensors") for name in ("my-style", "old"))
    assert (style.token, style.vectors.shape) == ("my-style", (2, WIDTH))
    assert (old.token, old.vectors.shape, old.vectors.dtype) == ("<old>", (1, WIDTH), np.float32)
    for key in ("*", "clip_l"):  # no names of words
        save_file({key: vectors(2)}, tmp_path / "easy.safetensors")
        assert embeddings.read(tmp_path / "easy.safetensors").token == "easy"


# ---- what a model becomes


def test_only_new_rows_are_new(folder, model, tmp_path):
    one = embeddings.save(tmp_path / "one", Embedding("<one>", vectors(1)))
    three = embeddings.save(tmp_path / "three", Embedding("<three>", vectors(3, seed=1)))
    loaded = load_folder(folder, words=[one, three])
    before, after = table(model), table(loaded)
    assert loaded.text_encoder.config.vocab_size == len(after) == len(before) + 4
    np.testing.assert_array_equal(after[: len(before)], before)
    np.testing.assert_array_equal(after[len(before) :], np.concatenate([vectors(1), vectors(3, seed=1)]))
    for part in ("unet", "vae"):
        ours, theirs = getattr(loaded, part).params, getattr(model, part).params
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    ids = loaded.tokenizer.encode(["<three> a"])[0]
    assert ids[1:4].tolist() == [len(before) + 1, len(before) + 2, len(before) + 3]


def test_a_table_with_room_keeps_its_length(tmp_path, model):
    spare = model.tokenizer.vocab_size + 8
    folder = tiny_folder(tmp_path / "roomy", text_encoder={"vocab_size": spare})
    file = embeddings.save(tmp_path, Embedding("<two>", vectors(2)))
    loaded = load_folder(folder, words=[file])
    assert loaded.text_encoder.config.vocab_size == len(table(loaded)) == spare
    first = model.tokenizer.vocab_size
    np.testing.assert_array_equal(table(loaded)[first : first + 2], vectors(2))
    np.testing.assert_array_equal(table(loaded)[first + 2 :], table(load_folder(folder))[first + 2 :])


def test_in_bfloat16_and_with_a_lora(folder, model, tmp_path):
    configs = {kind: getattr(model, kind).config for kind in lora.KINDS}
    fresh = lora.fresh(jax.random.key(0), configs, ["q_proj"], 2, 2.0)
    layers = jax.tree.map(lambda x: np.ones(x.shape, np.float32), fresh.layers)
    file = lora_files.save(tmp_path / "lora", lora.Lora(layers, fresh.alphas))
    word = embeddings.save(tmp_path / "word", Embedding("<one>", vectors(1)))
    both = load_folder(folder, dtype=jnp.bfloat16, loras=[(file, 1.0)], words=[word])
    alone = load_folder(folder, dtype=jnp.bfloat16, loras=[(file, 1.0)])
    assert table(both).dtype == jnp.bfloat16
    np.testing.assert_array_equal(table(both)[-1], vectors(1)[0].astype(jnp.bfloat16))
    ours, theirs = (traverse_util.flatten_dict(each.text_encoder.params) for each in (both, alone))
    for path in ours.keys() - {TABLE}:
        np.testing.assert_array_equal(ours[path], theirs[path])


def test_a_model_with_words_is_saved_with_them(folder, tmp_path):
    file = embeddings.save(tmp_path, Embedding("<three>", vectors(3)))
    loaded = load_folder(folder, words=[file])
    save_folder(tmp_path / "saved", loaded)
    again = load_folder(tmp_path / "saved")
    np.testing.assert_array_equal(table(again), table(loaded))
    prompts = ["a <three> fox"]
    np.testing.assert_array_equal(again.tokenizer.encode(prompts), loaded.tokenizer.encode(prompts))


def test_another_prompt_compiles_nothing(folder, tmp_path):
    file = embeddings.save(tmp_path, Embedding("<three>", vectors(3)))
    pipe = engine.load(folder, embeddings=[file])
    COMPILED.clear()
    contexts = [pipe.encode([prompt], 1)[prompt].words for prompt in ("a fox", "a <three>", "a <three> fox")]
    assert COMPILED["jit(_encode)"] == 1
    plain = engine.load(folder).encode(["a fox", "a <three>"], 1)
    np.testing.assert_allclose(contexts[0], plain["a fox"].words, atol=1e-6)
    assert np.abs(contexts[1] - plain["a <three>"].words).max() > 0.1


# ---- of SDXL


def xl_file(path, count=2, second=20):
    save_file({"clip_l": vectors(count), "clip_g": vectors(count, second, seed=1)}, path)
    return path


def test_of_sdxl_both_text_encoders_learn(tmp_path):
    """The refiner, which has the second alone, reads the same file."""
    file = xl_file(tmp_path / "zzbad.safetensors")
    wanted = {"text_encoder": vectors(2), "text_encoder_2": vectors(2, 20, seed=1)}
    for name, overrides in (("base", XL), ("refiner", REFINER)):
        folder = tiny_folder(tmp_path / name, **overrides)
        before, after = load_folder(folder), load_folder(folder, words=[file])
        for kind, (part, tokenizer) in after.readers.items():
            own, _ = before.readers[kind]
            count = own.config.vocab_size
            old, new = (np.asarray(traverse_util.flatten_dict(each.params)[TABLE]) for each in (own, part))
            np.testing.assert_array_equal(new, np.concatenate([old, wanted[kind]]))
            assert part.config.vocab_size == len(new)
            assert tokenizer.encode(["zzbad"])[0][1:3].tolist() == [count, count + 1]
    save_folder(tmp_path / "saved", after)
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal, load_folder(tmp_path / "saved").parts["text_encoder_2"].params, part.params
        )
    )


def test_mistakes_of_sdxl(tmp_path):
    folder = tiny_folder(tmp_path / "model", **XL)

    def refused(told, file):
        with pytest.raises(UserError, match=told) as error:
            load_folder(folder, words=[file])
        assert str(file) in str(error.value) and "\n" not in str(error.value)

    one = embeddings.save(tmp_path / "one.safetensors", Embedding("<x>", vectors(1)))
    refused(
        "for another model: Stable Diffusion 1 or 2; this one is XL, and takes files with clip_l and", one
    )
    refused(
        "have 32 numbers, those of this model's words 20", xl_file(tmp_path / "wide.safetensors", second=32)
    )
    uneven = {"clip_l": vectors(1), "clip_g": vectors(2, 20)}
    save_file(uneven, tmp_path / "y.safetensors")
    refused("has 1 vectors in clip_l and 2 in clip_g", tmp_path / "y.safetensors")
    save_file(uneven | {"more": vectors(1)}, tmp_path / "z.safetensors")
    refused(r"holds no embedding, .* it holds \(3\)", tmp_path / "z.safetensors")
    refused("the token 'at' is in the tokenizer already: rename", xl_file(tmp_path / "at.safetensors"))


# ---- mistakes


def saved(name="x.safetensors", **tensors):
    def make(folder):
        save_file(tensors, folder / name)
        return folder / name

    return make


def written(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def truncated(folder):
    path = embeddings.save(folder / "short.safetensors", Embedding("<x>", vectors(3)))
    path.write_bytes(path.read_bytes()[:-10])
    return path


MISTAKES = {
    "missing": (
        lambda folder: folder / "lost",
        "no embedding",
        "lost: write the path of a .safetensors file",
    ),
    "empty folder": (lambda folder: folder, "no embedding", "learned_embeds.safetensors"),
    "pickle": (
        written("cat.pt", b"\x80\x02"),
        "cat.pt is in a format that is never opened because it can run code",
        'save_file({"emb_params": v}, "cat.safetensors")',
        'torch.load("cat.pt", weights_only=True)',
    ),
    "bin": (written("learned_embeds.bin", b"PK"), "never opened because it can run code"),
    "truncated": (truncated, "short.safetensors is broken, or a download that stopped early"),
    "no safetensors": (written("x.safetensors", b"hello"), "x.safetensors is broken"),
    "two keys": (
        saved(a=vectors(1), b=vectors(1)),
        "holds no embedding, such as",
        "(2) a (1, 24), b (1, 24)",
    ),
    "weights": (saved(w=np.zeros((2, 2, 3), np.float32)), "holds no embedding", "w (2, 2, 3)"),
    "nothing": (saved(), "holds no embedding", "(0)"),
    "no vectors": (saved(w=np.zeros((0, WIDTH), np.float32)), "holds no embedding", "w (0, 24)"),
    "SDXL": (saved(clip_l=vectors(1), clip_g=vectors(1, 40)), "made for another model: Stable Diffusion XL"),
    "whole numbers": (saved(x=np.zeros((1, WIDTH), np.int64)), "x is I64; write it as one of F32"),
    "NaN": (saved(x=np.full((1, WIDTH), np.nan, np.float32)), "holds a NaN or an infinity"),
    "another width": (
        saved(x=vectors(1, 32)),
        "made for another model: its vectors have 32 numbers, those of this model's words 24",
    ),
    "a word of the model": (
        saved("at.safetensors", emb_params=vectors(1)),
        "the token 'at' is in the tokenizer already: rename the file",
    ),
    "a taken word": (
        saved(at=vectors(1)),
        "the token 'at' is in the tokenizer already: train it with another placeholder",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_name_the_file(folder, tmp_path, case):
    make, *words = MISTAKES[case]
    path = make(tmp_path)
    with pytest.raises(UserError) as error:
        load_folder(folder, words=[path])
    assert all(word in str(error.value) for word in words), error.value
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_same_file_twice_is_a_mistake(folder, tmp_path):
    file = embeddings.save(tmp_path, Embedding("<x>", vectors(2)))
    with pytest.raises(UserError, match=r"'<x>' is in the tokenizer already: .* name each file once"):
        load_folder(folder, words=[file, file])
