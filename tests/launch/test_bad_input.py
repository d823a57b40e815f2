"""Each mistake is one line on stderr that says what to write instead, exit code 2, and nothing is lost."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import engine
from engine import finish, loading, pipeline
from engine.weights.folder import save_folder
from launch import cli
from tests.tiny import tiny_model

ROOT = pathlib.Path(__file__).parents[2]


def check_refused(done, *words: str) -> None:
    """One line of error, with these words in it, after no picture."""
    assert (done.code, done.paths) == (cli.MISTAKE, [])
    (line,) = done.told
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


# flags, prompts and settings

WRONG = {
    "unknown flag": (
        ["x", "--setps", "3"],
        "unknown flag --setps (did you mean --steps?); --help lists them all",
    ),
    "unknown flag like nothing": (["x", "--zzz"], "unknown flag --zzz; --help lists them all"),
    "flag of absl": (["x", "--verbosity=1"], "unknown flag --verbosity"),
    "no value": (["x", "--steps"], "write a value after --steps"),
    "no number": (["x", "--steps=many"], "--steps=many: write a whole number"),
    "no whole number": (["x", "--num_images=1.5"], "--num_images=1.5: write a whole number"),
    "number without end": (["x", "--seed", "9" * 5000], "write a whole number"),
    "no float": (["x", "--guidance_scale=high"], "--guidance_scale=high: write a number"),
    "no bool": (["x", "--animate=maybe"], "--animate=maybe: write true or false"),
    "no prompt": ([], "no prompt: write what to draw, such as"),
    "no prompt, only flags": (["--steps", "3"], "no prompt"),
    "negative seed": (["x", "--seed", "-1"], "seed=-1 is out of range; write 0 to 18446744073709551615"),
    "seed too large": (["x", f"--seed={2**64}"], "write 0 to 18446744073709551615"),
    "no pictures": (["x", "--num_images=0"], "num_images=0 is out of range; write 1 to"),
    "too many pictures": (["x", "y z", "--num_images=99999"], "write at most 100000"),
    "index": (["x", "--first_index=-1"], "first_index=-1 is out of range; write 0 to 4294967295"),
    "far": (
        ["x", "y", "--first_index=4294967295"],
        "2 pictures would go beyond 4294967295",
        "at most 4294967294",
    ),
    "batch size": (["x", "--batch_size=0"], "batch_size=0 is out of range; write 1 to"),
    "upscale": (["x", "--upscale=0"], "upscale=0 is out of range; write 1 to"),
    "sampler": (
        ["x", "--sampler=eular"],
        "sampler='eular' is unknown (did you mean euler?); write one of ddim,",
    ),
    "no steps": (["x", "--steps=0"], "steps=0 is out of range; write 1 to 1000"),
    "too many steps": (["x", "--steps=1001"], "steps=1001 is out of range; write 1 to 1000"),
    "height": (["x", "--height=17"], "height=17: this model makes multiples of 2; write 16"),
    "width": (["x", "--width=0"], "width=0: this model makes multiples of 2; write 2"),
    "huge": (["x", "--width=1000000"], "write 16384"),
    "not a number": (
        ["x", "--guidance_scale=nan"],
        "guidance_scale=nan is no number; 1 is none, 5 to 8 are usual",
    ),
    "parallel": (["x", "--parallel=shardmap"], "parallel='shardmap' is unknown (did you mean shard_map?)"),
    "dtype": (
        ["x", "--dtype=float16"],
        "dtype='float16' is unknown (did you mean bfloat16?); write float32 or",
    ),
    "words of one step": (["x", "--words", "--steps=1"], "behind the first step", "write more steps"),
    "one frame": (["x", "--frames=1"], "frames=1 is out of range", "write 2 to 3"),
    "too many frames": (["x", "--frames=9"], "frames=9 is out of range", "write 2 to 3"),
    "bytes that are no text": (["caf\udce9"], "character 4 is not Unicode text; use UTF-8"),
    "the same, negative": (
        ["x", "--negative_prompt=caf\udce9"],
        "character 4 is not Unicode text; use UTF-8",
    ),
    "model": (["x", "--model=nowhere"], "no folder nowhere: a model is a folder on this disk"),
    "model of a hub": (["x", "--model=some/model"], "nothing is fetched by name"),
    "two lines": (["x", "--model=two\nlines\x1b[31m\u202e"], r"no folder two\nlines\x1b[31m\u202e"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(draw, tmp_path, case):
    argv, *words = WRONG[case]
    check_refused(draw(*argv), *words)
    assert list(tmp_path.iterdir()) == []  # no empty folder is left


# prompts that are strange, but fine

STRANGE = {
    "slashes": "../../../etc/passwd\\..\\x",
    "NUL": "a \0 fox",
    "lines": "a fox\non\r\na board\u2028",
    "right to left": "\u202e\u05e9\u05d5\u05e2\u05dc \u05d0\u05d3\u05d5\u05dd\u202c",
    "nothing": "",
    "emoji": "🦊",
    "escape": "\x1b]0;title\x07fox",
    "long": "red fox " * 5000,
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_prompts_stay_out_of_file_names(draw, tmp_path, case):
    done = draw(STRANGE[case], "--seed", 1)
    assert done.code == 0
    (path,) = done.paths
    assert [*tmp_path.iterdir()] == [tmp_path / "out"] and [*(tmp_path / "out").iterdir()] == [path]
    assert re.fullmatch(r"00000-[a-z0-9-]{1,60}\.png", path.name)
    assert finish.read_settings(path)["prompt"] == STRANGE[case]
    assert all(line.isprintable() for line in done.told)
    if case == "long":
        assert sum("cut at |" in line for line in done.told) == 1
    assert draw("--like", path).paths == [path]


# model folders


def edit_json(path: pathlib.Path, **options) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(path: pathlib.Path) -> None:
    path.rename(path.with_suffix(".bin"))


def other_shape(path: pathlib.Path) -> None:
    edit_json(path.with_name("config.json"), block_out_channels=[16, 48])


UNET = "unet/diffusion_pytorch_model.safetensors"
BROKEN = {
    "no index": ("model_index.json", pathlib.Path.unlink, "is no model: looked for model_index.json"),
    "no config": ("unet/config.json", pathlib.Path.unlink, "unet/config.json cannot be read"),
    "no weights": (UNET, pathlib.Path.unlink, "has no diffusion_pytorch_model.safetensors"),
    "no vocabulary": (
        "tokenizer/tokenizer.json",
        lambda f: [f.unlink(), f.with_name("vocab.json").unlink()],
        "vocab.json is missing",
    ),
    "no scheduler": (
        "scheduler/scheduler_config.json",
        pathlib.Path.unlink,
        "scheduler_config.json cannot be read",
    ),
    "truncated": (UNET, cut, UNET),
    "truncated config": ("vae/config.json", cut, "vae/config.json is not JSON"),
    "shape": (UNET, other_shape, "wrong shape"),
    "option": (
        "unet/config.json",
        lambda f: edit_json(f, layers_per_blok=2),
        "unknown option 'layers_per_blok' (did you mean layers_per_block?)",
    ),
    "pickle": (UNET, as_pickle, "never opened because it can run code"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_model_folders(draw, model, tmp_path, case):
    file, spoil, words = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    spoil(folder / file)
    check_refused(draw("x", "--model", folder), str(folder), words)
    assert [*tmp_path.iterdir()] == [folder]


# --like


def test_like_needs_a_picture_that_can_be_followed(draw, run, model, tmp_path):
    done = draw("a fox", "a cat", "--seed", 1)
    picture, _, sheet = done.paths
    settings = finish.read_settings(picture)
    check_refused(run("--like", tmp_path / "none.png"), "no such file")
    check_refused(run("--like", model / "model_index.json"), "no PNG")
    check_refused(run("--like", sheet), "is a contact sheet; write the path of one of its pictures")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "bare.png")
    check_refused(run("--like", tmp_path / "bare.png"), "no settings inside")

    def like(**changes) -> object:
        told = {name: value for name, value in (settings | changes).items() if value is not ...}
        finish.write_png(tmp_path / "x.png", np.zeros((4, 4, 3), np.uint8), told)
        return run("--like", tmp_path / "x.png", "--out", tmp_path / "like")

    check_refused(like(steps=...), "does not say its steps")
    check_refused(like(steps="many"), 'x.png: steps="many": write a whole number')
    check_refused(like(prompt=["a", "b"]), "x.png", "prompt")
    check_refused(like(eta=1, version="3.0"), "drawn by fogsculpt 3.0, has settings unknown", "eta")
    check_refused(like(out="/etc"), "unknown to this version: out")
    check_refused(like(batch_size=10**9), "batch_size=1000000000 is out of range")
    check_refused(
        like(model="gone/model"), "was drawn by the model gone/model, which is not here; write --model"
    )
    assert not (tmp_path / "like").exists()


# disks


def test_out_is_a_file(draw, tmp_path):
    (tmp_path / "out").write_text("precious")
    check_refused(draw("x"), "something else has that name; choose another folder with --out")
    check_refused(draw("x", "--out", tmp_path / "out" / "below"), "choose another folder with --out")
    assert (tmp_path / "out").read_text() == "precious"


def test_out_cannot_be_written(draw):
    check_refused(draw("x", "--out", "/proc/none"), "/proc/none: cannot be written")
    check_refused(draw("x", "--out", "gs://bucket/x"), "gs://bucket/x: write a folder of this machine")


def test_no_space_left(draw, tmp_path, monkeypatch):
    """The disk is full at the fourth of six pictures: three stay, whole."""
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 7:  # a file and its folder each
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    done = draw("a fox", "--num_images", 6, "--seed", 1)
    assert done.code == cli.MISTAKE
    assert re.fullmatch(r"error: .*00003-a-fox\.png: cannot be written: No space left.*--out", done.told[-1])
    assert sorted((tmp_path / "out").iterdir()) == done.paths
    assert [finish.read_settings(path)["index"] for path in done.paths] == [0, 1, 2]


def test_where_no_cache_can_be_kept_nothing_is(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    loading.use_compilation_cache()
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)
    assert kept is None


# while it runs


def test_a_nan_costs_only_the_picture_that_it_strikes(run, tmp_path):
    """The embedding of one token is NaN: so is every picture whose prompt holds it, and no other."""
    spoilt = tiny_model()
    fox, car, trees = map(set, spoilt.tokenizer.encode(["a red fox", "a blue car", "two trees"]))
    token = min(car - fox - trees)
    table = spoilt.text_encoder.params["text_model"]["embeddings"]["token_embedding"]
    table["embedding"] = table["embedding"].at[token].set(np.nan)
    save_folder(tmp_path / "spoilt", spoilt)
    flags = ("--model", tmp_path / "spoilt", "--steps", 2, "--batch_size", 2, "--seed", 7)
    done = run("a red fox", "a blue car", "two trees", *flags, "--out", tmp_path / "out")
    assert done.code == cli.FAILED
    assert [path.name for path in done.paths] == ["00000-a-red-fox.png", "00002-two-trees.png", "sheet-7.png"]
    assert sorted((tmp_path / "out").iterdir()) == done.paths
    (line,) = (line for line in done.told if "NaN" in line)
    assert line.startswith("error: picture 1 of seed 7 ") and line.endswith(
        "write a smaller --guidance_scale"
    )


def test_out_of_memory(draw, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nand so on")

    monkeypatch.setattr(pipeline.Pipeline, "stream", exhausted)
    check_refused(draw("a fox", "--seed=1"), "out of memory; write --batch_size 1")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(jax, "default_backend", lambda: "tpu")
        done = draw("a fox", "--seed=1")
    check_refused(done, "out of memory; write --batch_size 1, or --dtype bfloat16")
    assert "--height" in draw("x", "--seed=1", "--batch_size=1").told[-1]


def test_what_is_no_mistake_of_the_user_shows_its_traceback(draw, monkeypatch):
    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(pipeline.Pipeline, "stream", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        draw("x", "--seed=1")


def test_ctrl_c_keeps_the_pictures_so_far(model, tmp_path):
    argv = (
        "a fox",
        "--model",
        model,
        "--num_images",
        10_000,
        "--batch_size",
        1,
        "--steps",
        2,
        "--out",
        tmp_path,
    )
    command = [sys.executable, "-m", "launch.generate", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}  # readline takes one line
    with subprocess.Popen(command, cwd=ROOT, **pipes) as program:
        first = program.stdout.readline().decode()
        program.send_signal(signal.SIGINT)
        more, told = (said.decode() for said in program.communicate(timeout=600))
    paths = [pathlib.Path(line) for line in [first.strip(), *more.splitlines()]]
    assert program.returncode == cli.STOPPED
    assert told.splitlines()[-1] == f"stopped: {len(paths)} of 10000 pictures are in {tmp_path}"
    assert "Traceback" not in told
    assert sorted(tmp_path.iterdir()) == paths
    assert [finish.read_settings(path)["index"] for path in paths] == [*range(len(paths))]


@pytest.mark.parametrize("moment", ["load", "stream"])
def test_ctrl_c_is_put_off_to_where_it_is_safe(draw, monkeypatch, moment):
    """Raised on the spot it can be lost in a callback of JAX, or crash an import."""
    where = engine if moment == "load" else pipeline.Pipeline
    before, reached = getattr(where, moment), []

    def pressed(*args, **options):
        signal.raise_signal(signal.SIGINT)
        reached.append(moment)
        return before(*args, **options)

    monkeypatch.setattr(where, moment, pressed)
    handler = signal.getsignal(signal.SIGINT)
    done = draw("a fox", "--seed", 1)
    assert (done.code, done.paths, reached) == (cli.STOPPED, [], [moment])
    assert re.fullmatch(
        "stopped" if moment == "load" else "stopped: 0 of 1 pictures are in .*/out", done.told[-1]
    )
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert not cli._signals
