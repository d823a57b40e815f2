"""--embedding: new words in prompts, remembered in pictures and jobs; its mistakes in one line."""

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engine import finish
from engine.config import GenerateConfig
from engine.types import UserError
from engine.weights import embeddings
from launch import cli

PROMPT = "a <my-thing> at night"


def write(path, seed=0, token="<my-thing>", shape=(2, 24)):
    vectors = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return embeddings.save(path, embeddings.Embedding(token, vectors))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("embeddings") / "thing.safetensors")


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_word_changes_the_picture_which_remembers_it(draw, run, file, tmp_path):
    (without,) = draw(PROMPT, "--seed", 3).paths
    done = draw(PROMPT, "--seed", 3, "--embedding", file)
    (with_it,) = done.paths
    assert np.abs(pixels(without).astype(int) - pixels(with_it)).mean() > 5
    assert finish.read_settings(with_it)["embedding"] == str(file)
    assert "embedding" not in finish.read_settings(without)
    again = run("--like", with_it, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == with_it.read_bytes()
    plain = run("--like", with_it, "--embedding=", "--out", tmp_path / "plain")
    assert plain.paths[0].read_bytes() == without.read_bytes()


def test_only_other_words_are_unknown(draw, file):
    unknown = [line for line in draw(PROMPT, "--seed", 3).told if "never saw" in line]
    assert unknown == ["warning: words that the model never saw: my, thing"]
    told = draw(f"{PROMPT} zebra", "--seed", 3, "--embedding", file).told
    assert [line for line in told if "never saw" in line] == [
        "warning: words that the model never saw: zebra"
    ]


def test_two_files_of_two_formats(draw, file, tmp_path):
    vectors = np.random.default_rng(1).standard_normal((1, 24), np.float32)
    save_file({"emb_params": vectors}, tmp_path / "my-style.safetensors")
    flag = f"{file}, {tmp_path / 'my-style.safetensors'}"
    (both,) = draw("a <my-thing>, my-style", "--seed", 3, "--embedding", flag).paths
    (one,) = draw("a <my-thing>, my-style", "--seed", 3, "--embedding", file).paths
    assert (pixels(both) != pixels(one)).any()


def test_like_tells_of_an_embedding_that_is_gone(draw, run, file, tmp_path):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(file.read_bytes())
    (path,) = draw(PROMPT, "--seed", 3, "--embedding", gone).paths
    gone.unlink()
    done = run("--like", path)
    assert (done.code, done.paths) == (cli.MISTAKE, [])
    assert done.told == [
        f"error: {path} was drawn with the embedding {gone}, which is not here; write --embedding FILE"
    ]


def test_a_job_is_that_of_its_words(job, draw, file, tmp_path):
    rows, flags = [{"prompt": PROMPT}], ("--format", "files")
    assert job(*flags, "--embedding", file, rows=rows).code == cli.DONE
    (path,) = (tmp_path / "out").rglob("*.png")
    (single,) = draw(PROMPT, "--seed", 7, "--embedding", file, "--out", tmp_path / "single").paths
    # A job encodes its words in batches of another size.
    assert np.abs(pixels(path).astype(int) - pixels(single)).max() <= 1

    moved = tmp_path / "elsewhere" / file.name
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    assert job(*flags, "--embedding", moved, rows=rows).code == cli.DONE  # all is done
    other = write(tmp_path / "other" / file.name, seed=1)
    for value in ("", other):
        refused = job(*flags, "--embedding", value, rows=rows)
        assert refused.code == cli.MISTAKE
        assert "another job" in refused.told[-1] and "embedding 'thing.safetensors (" in refused.told[-1]


# ---- mistakes


def truncated(file, folder):
    path = folder / "short.safetensors"
    path.write_bytes(file.read_bytes()[:-10])
    return path


def pickled(file, folder):
    path = folder / "cat.bin"
    path.write_bytes(b"PK")
    return path


def of_another_model(file, folder):
    return write(folder / "big.safetensors", shape=(1, 768))


def of_a_known_word(file, folder):
    return write(folder / "x.safetensors", token="at")


MISTAKES = {
    "missing": (lambda file, folder: folder / "nowhere", "no embedding", "nowhere: write the path"),
    "empty folder": (lambda file, folder: folder, "learned_embeds.safetensors"),
    "truncated": (truncated, "short.safetensors is broken, or a download that stopped early"),
    "pickle": (pickled, "cat.bin is in a format that is never opened", "convert it with PyTorch"),
    "another model": (of_another_model, "big.safetensors was made for another model", "768 numbers", "24"),
    "a word of the model": (of_a_known_word, "the token 'at' is in the tokenizer already"),
    "one is sound": (lambda file, folder: f"{file},{truncated(file, folder)}", "short.safetensors is broken"),
    "an empty name": (lambda file, folder: f"{file},,", "write FILE, with commas between several"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(draw, file, tmp_path, case):
    make, *words = MISTAKES[case]
    done = draw(PROMPT, "--embedding", make(file, tmp_path))
    assert (done.code, done.paths, len(done.told)) == (cli.MISTAKE, [], 1)
    assert all(word in done.told[0] for word in words), done.told
    assert not (tmp_path / "out").exists()


def test_weights_of_a_model_are_no_embedding(draw, model):
    done = draw(PROMPT, "--embedding", model / "text_encoder" / "model.safetensors")
    assert done.code == cli.MISTAKE and 'holds no embedding, such as {"<my-thing>": (1, 768)}' in done.told[0]


def test_how_files_are_written():
    assert GenerateConfig().embeddings() == ()
    assert GenerateConfig(embedding="a.safetensors, b/c=d").embeddings() == ("a.safetensors", "b/c=d")
    for text in (",", "a,", " ", "a,,b"):
        with pytest.raises(UserError, match="write FILE, with commas between several"):
            GenerateConfig(embedding=text).embeddings()
