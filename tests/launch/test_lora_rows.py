"""Rows of a job with LoRAs of their own: drawn as single runs are, together where they are the same, and
nothing is compiled for them."""

import itertools
import json
import pathlib
import weakref

import jax
import numpy as np
import pytest

import engine
from engine import finish
from engine.config import JobConfig
from engine.jobs import wording
from engine.jobs.settling import settle_with
from engine.text.rows import read_rows
from launch import cli
from tests.compiled import COMPILED
from tests.launch.test_bulk import facts, out_of_memory, png_of
from tests.launch.test_edit_flags import pixels
from tests.launch.test_edit_jobs import failures
from tests.launch.test_lora import configs, write  # noqa: F401
from tests.tiny import tiny_model

SIXTEEN = ("--batch_size", 16)  # as many as prompts are encoded at once in a job


@pytest.fixture
def loras(configs, tmp_path):  # noqa: F811
    """Beside the rows."""
    return [write(tmp_path / f"{name}.safetensors", configs, seed=i) for i, name in enumerate(("fox", "cat"))]


ROWS = [
    {"prompt": "a red fox"},
    {"prompt": "a cat", "lora": "fox.safetensors"},
    {"prompt": "a dog", "lora": "cat.safetensors=0.5,fox.safetensors=0.25"},
    {"prompt": "a car", "lora": "fox.safetensors"},
    {"prompt": "a boat", "lora": ""},
]


def test_rows_are_those_of_single_runs_bit_for_bit(job, draw, run, loras, tmp_path):
    outcome = job(*SIXTEEN, "--seed", 3, rows=ROWS)
    assert outcome.code == cli.DONE, outcome.told
    for number, row in enumerate(ROWS):
        path = png_of(tmp_path / "out", number)
        own = ",".join(f"{tmp_path}/{file}" for file in row.get("lora", "").split(",") if file)
        options = ("--seed", 3, "--first_index", number, *SIXTEEN, "--out", tmp_path / "alone")
        (alone,) = draw(row["prompt"], *options, *(("--lora", own) if own else ())).paths
        np.testing.assert_array_equal(pixels(alone), pixels(path))
        settings = finish.read_settings(path)
        assert settings.get("lora", "") == own
        assert settings["contents"] == finish.read_settings(alone)["contents"]
        again = run("--like", path, "--out", tmp_path / "again")
        assert again.paths[0].read_bytes() == path.read_bytes(), row
    assert facts(tmp_path / "out")[1]["edit"] == {"lora": f"{tmp_path}/fox.safetensors"}
    images = [pixels(png_of(tmp_path / "out", number)).astype(int) for number in (1, 3)]
    plain = [pixels(draw(ROWS[n]["prompt"], "--seed", 3, "--first_index", n).paths[0]) for n in (1, 3)]
    assert all(np.abs(a - b).max() > 8 for a, b in zip(images, plain, strict=True))


def test_those_of_the_job_are_for_rows_that_say_nothing(job, draw, loras, tmp_path):
    assert job(*SIXTEEN, "--seed", 3, "--lora", f"{loras[0]}=0.5", rows=ROWS).code == cli.DONE
    told = [finish.read_settings(png_of(tmp_path / "out", number)) for number in range(len(ROWS))]
    assert told[0]["lora"] == f"{loras[0]}=0.5" and told[1]["lora"] == str(loras[0])
    assert "lora" not in told[4] and "lora" not in told[4]["contents"]
    (plain,) = draw("a boat", "--seed", 3, "--first_index", 4, *SIXTEEN, "--out", tmp_path / "one").paths
    np.testing.assert_array_equal(pixels(plain), pixels(png_of(tmp_path / "out", 4)))


@pytest.fixture
def loaded(monkeypatch):
    """The names of the files of each set that is loaded."""
    found = []
    real = engine.pipeline.Pipeline.with_loras

    def with_loras(pipe, files):
        found.append([pathlib.Path(path).name for path, _ in files])
        return real(pipe, files)

    monkeypatch.setattr(engine.pipeline.Pipeline, "with_loras", with_loras)
    return found


def test_nothing_is_compiled_for_them_and_each_is_loaded_once(run, prompts, loras, loaded, model, tmp_path):
    """However many rows have one, and of what sizes they are."""
    rows = [
        {"prompt": "a fox", "width": width} | ({"lora": lora} if lora else {})
        for width in (16, 32)
        for lora, count in (("fox.safetensors", 1), ("", 3), ("./cat.safetensors", 2))
        for _ in range(count)
    ]
    common = ("--model", model, "--steps", 3, "--seed", 3, "--shard_size", 4)
    plain = [row for row in rows if "lora" not in row]
    assert run("--prompts_file", prompts(plain), *common, "--out", tmp_path / "plain").code == cli.DONE
    before = COMPILED.copy()
    outcome = run("--prompts_file", prompts(rows), *common, "--out", tmp_path / "out")
    assert outcome.code == cli.DONE and before == COMPILED
    assert any("12 rows in 6 shards, 2 programs to compile" in line for line in outcome.told), outcome.told
    assert loaded == [["fox.safetensors"], ["cat.safetensors"]]


def test_prompts_of_a_shard_are_encoded_once(job, loras, monkeypatch):
    asked, real = [], engine.pipeline.Pipeline.encode

    def encode(pipe, prompts, size):
        asked.append(len(prompts))
        return real(pipe, prompts, size)

    monkeypatch.setattr(engine.pipeline.Pipeline, "encode", encode)
    monkeypatch.setattr(wording, "CONTEXTS", 1)  # so that nothing is known of the batch before
    rows = [{"prompt": f"a fox {i}", "lora": "fox.safetensors"} for i in range(4)]
    assert job("--batch_size", 1, "--shard_size", 4, rows=rows).code == cli.DONE
    assert asked == [5]  # and the negative one


def test_without_room_for_them_the_job_says_so_and_goes_on(job, loras, monkeypatch, tmp_path):
    def no_room(*_):
        raise out_of_memory()

    with monkeypatch.context() as patch:
        patch.setattr(engine.pipeline.Pipeline, "with_loras", no_room)
        outcome = job(rows=ROWS)
    assert outcome.code == cli.MISTAKE
    assert "out of memory: LoRAs of rows take that of a second U-Net" in outcome.told[-1]
    assert job(rows=ROWS).code == cli.DONE and len(facts(tmp_path / "out")) == len(ROWS)


def test_a_job_knows_them_and_goes_on(job, configs, loras, tmp_path):  # noqa: F811
    assert job(rows=ROWS).code == cli.DONE
    assert job(rows=ROWS).code == cli.DONE
    write(loras[0], configs, seed=9)
    other = job(rows=ROWS)
    assert other.code == cli.MISTAKE and "or other LoRAs of rows" in other.told[-1], other.told


WRONG = ("none", "../fox", "other", "broken")


def test_rows_that_cannot_be_drawn(job, loras, tmp_path, configs):  # noqa: F811
    narrow = tiny_model(unet={"block_out_channels": (8, 16)}).unet.config
    write(tmp_path / "other.safetensors", configs | {"unet": narrow})
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    rows = [
        {"prompt": "a fox", "lora": "fox.safetensors"},
        *({"prompt": "a fox", "lora": f"{name}.safetensors"} for name in WRONG),
        {"prompt": "a fox", "lora": "fox.safetensors=much"},
        {"prompt": "a fox", "lora": 3},
    ]
    assert job(rows=rows).code == cli.FAILED
    reasons = {row: one["reason"] for row, one in failures(tmp_path / "out").items()}
    for row, reason in enumerate(
        (
            "no LoRA ",
            "lora='../fox.safetensors' leads out of the folder",
            "does not fit this model",
            "broken.safetensors",
            "write FILE or FILE=SCALE",
            "lora=3: write a text",
        ),
        1,
    ):
        assert reason in reasons[row] and "\n" not in reasons[row], reasons[row]
    assert sorted(facts(tmp_path / "out")) == [0]


def test_what_is_no_path_below_the_folder(run, model, configs, tmp_path, monkeypatch):  # noqa: F811
    """A home, whatever the name begins with; a link in a folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "rows" / "sub").mkdir(parents=True)
    secret = write(tmp_path / "home" / "secret.safetensors", configs)
    (tmp_path / "rows" / "sub" / "pytorch_lora_weights.safetensors").symlink_to(secret)
    monkeypatch.chdir(tmp_path / "rows")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rows = [{"prompt": "a", "lora": lora} for lora in ("~/secret.safetensors", "sub", "x" * 300)]
    (tmp_path / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--model", model, "--seed", 3, "--steps", 2, "--out", tmp_path / "out")
    assert run("--prompts_file", "rows.jsonl", *common).code == cli.FAILED
    reasons = [failures(tmp_path / "out")[row]["reason"] for row in range(3)]
    assert reasons[0].startswith("no LoRA ~/secret.safetensors")
    assert "leads out of the folder" in reasons[1] and "File name too long" in reasons[2]


def test_a_folder_whose_name_is_part_of_the_list(run, model, configs, tmp_path):  # noqa: F811
    common = ("--model", model, "--seed", 3, "--steps", 2, *SIXTEEN)
    for name, code in (("x=1", cli.DONE), ("a,b", cli.FAILED)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "fox.safetensors", configs)
        rows = tmp_path / name / "rows.jsonl"
        rows.write_text(json.dumps({"prompt": "a fox", "lora": "fox.safetensors"}))
        assert run("--prompts_file", rows, *common, "--out", tmp_path / name / "out").code == code
    path = png_of(tmp_path / "x=1" / "out", 0)
    assert run("--like", path, "--out", tmp_path / "again").paths[0].read_bytes() == path.read_bytes()
    assert "has a comma in its name" in failures(tmp_path / "a,b" / "out")[0]["reason"]


@pytest.mark.parametrize("gone", [False, True], ids=["changed", "gone"])
def test_what_changes_while_the_job_runs_is_not_drawn(job, configs, loras, tmp_path, monkeypatch, gone):  # noqa: F811
    real = wording.Wordings.of

    def of(wordings, lora):
        if lora is not None and "cat" in lora.told:
            loras[1].unlink() if gone else write(loras[1], configs, seed=9)
        return real(wordings, lora)

    monkeypatch.setattr(wording.Wordings, "of", of)
    assert job(rows=ROWS).code == cli.FAILED
    ((row, failure),) = failures(tmp_path / "out").items()
    told = "cannot be read any more: no LoRA" if gone else "has changed since the job was planned"
    assert row == 2 and told in failure["reason"]
    assert sorted(facts(tmp_path / "out")) == [0, 1, 3, 4]  # no row stops the others


def test_at_most_one_is_in_memory_beside_the_model(model, configs, loras, tmp_path):  # noqa: F811
    pipe = engine.load(model)
    held = wording.Wordings(pipe)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "lora": file.name}) + "\n" for file in loras))
    with read_rows(str(rows), None) as found:
        settle = settle_with(JobConfig(prompts_file=str(rows), seed=1), pipe)
        fox, cat = (settle(row).lora for row in found)
    assert held.are_there(None) and not held.are_there(fox)
    first = held.of(fox)
    assert held.of(fox) is first and held.are_there(fox)
    prompts = [f"{a} {b}" for a, b in itertools.product(("a", "red"), ("fox", "car"))]
    assert not np.array_equal(first.pipe.generate(prompts, seed=1), pipe.generate(prompts, seed=1))
    params = weakref.ref(jax.tree.leaves(first.pipe.model.unet.params)[0])
    del first
    held.of(cat)
    assert params() is None and not held.are_there(fox)
    assert held.of(None).pipe is pipe
