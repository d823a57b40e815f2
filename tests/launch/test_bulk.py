"""launch.generate with --prompts_file: jobs that go on, that fail row by row, and that can be checked."""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from engine import finish
from engine.jobs import folder
from engine.jobs.formats import read_pngs
from engine.jobs.store import open_store
from launch import bulk, cli
from tests.compiled import COMPILED
from tests.launch.conftest import ROWS


def pictures(out):
    """number -> sha256, of all manifests."""
    manifests = [json.loads(path.read_text()) for path in sorted((out / "manifests").iterdir())]
    return {p["number"]: p["sha256"] for manifest in manifests for p in manifest["pictures"]}


def facts(out):
    """number -> what the manifests say of the picture."""
    manifests = [json.loads(path.read_text()) for path in sorted((out / "manifests").iterdir())]
    return {p["number"]: p for manifest in manifests for p in manifest["pictures"]}


def png_of(out, number):
    (path,) = (out / "shards").glob(f"*/{number:08d}-*.png")
    return path


def test_every_row_gets_its_pictures(job, run, tmp_path):
    outcome = job("--num_images", 2)
    assert outcome.code == cli.DONE, outcome.told
    out = tmp_path / "out"
    found = facts(out)
    assert sorted(found) == list(range(14))
    assert found[2]["negative_prompt"] == "a dog" and found[2]["extra"] == {"note": "carried"}
    assert (found[4]["seed"], found[4]["index"], found[4]["steps"]) == (5, 0, 3)
    assert (found[5]["seed"], found[5]["index"]) == (5, 1)
    assert (found[7]["seed"], found[7]["index"], found[7]["guidance_scale"]) == (7, 7, 1)
    assert found[8]["id"] == "wide"
    assert Image.open(png_of(out, 8)).size == (24, 16)
    assert found[12]["sampler"] == "ddim"
    assert run("--verify", out).code == cli.DONE


def test_pictures_are_those_of_single_runs(job, run, tmp_path):
    """The address (seed, index) is all: a job draws what the same command draws alone."""
    assert job().code == cli.DONE
    for number in (0, 2, 4, 5):
        path = png_of(tmp_path / "out", number)
        outcome = run("--like", path, "--out", tmp_path / "again")
        assert outcome.code == cli.DONE, outcome.told
        again = np.asarray(Image.open(outcome.paths[0]), np.int16)
        assert np.abs(again - np.asarray(Image.open(path), np.int16)).max() <= 1


def test_few_programs_are_compiled(job, tmp_path, model, load_once):
    """As many as there are distinct shapes, however the rows are mixed."""
    sizes = [{"prompt": f"a cat {i}", "width": 16 + 8 * (i % 2), "guidance_scale": 2 + i} for i in range(12)]
    load_once.cache_clear()
    COMPILED.clear()
    outcome = job(rows=sizes)
    assert outcome.code == cli.DONE
    assert any("2 programs to compile" in line for line in outcome.told)
    pipe = load_once(str(model), "float32", "shard_map")
    assert pipe.programs.begin_program.cache_info().currsize == 1
    assert COMPILED["jit(segment)"] == 2
    assert COMPILED["jit(_encode)"] == 1


@pytest.mark.parametrize("format", ["files", "webdataset", "arrayrecord", "parquet"])
def test_formats_hold_the_same_pictures(job, run, tmp_path, format):
    out = tmp_path / "out"
    assert job("--format", format).code == cli.DONE
    assert run("--verify", out).code == cli.DONE
    store = open_store(str(out))
    found = {
        finish.read_settings(_file(tmp_path, png))["index"]: png
        for name in folder.done(store)
        for png in read_pngs(store, format, name)
    }
    assert len(found) == 6  # two of the seven have index 0
    outcome = run("--merge", out)
    lines = [json.loads(line) for line in outcome.paths[0].read_text().splitlines()]
    assert sorted(line["number"] for line in lines) == list(range(7))
    assert all((out / line["file"]).exists() for line in lines)


def _file(folder, png):
    path = folder / "one.png"
    path.write_bytes(png)
    return path


def test_a_job_goes_on_where_it_was(job, tmp_path):
    out = tmp_path / "out"
    assert job().code == cli.DONE
    whole = pictures(out)
    manifest, other = out / "manifests" / "000001.json", out / "manifests" / "000000.json"
    manifest.unlink()
    before = other.stat().st_mtime_ns
    outcome = job()
    assert outcome.code == cli.DONE
    assert [path.name for path in outcome.paths] == ["000001.json"]
    assert pictures(out) == whole
    assert other.stat().st_mtime_ns == before


def test_another_job_in_the_folder_is_refused_with_the_difference(job, prompts, tmp_path):
    assert job().code == cli.DONE
    for argv, difference in [
        (("--steps", 3), "steps 2 there and 3 here"),
        (("--seed", 8), "seed 7 there and 8 here"),
        (("--format", "parquet"), "format 'files' there and 'parquet' here"),
        (("--negative_prompt", "blue"), "negative_prompt '' there and 'blue' here"),
    ]:
        outcome = job(*argv)
        assert outcome.code == cli.MISTAKE
        assert difference in outcome.told[-1] and "another job" in outcome.told[-1]
    outcome = job(rows=ROWS[:-1])
    assert outcome.code == cli.MISTAKE and "other rows" in outcome.told[-1]


def test_without_a_seed_the_job_keeps_its_own(draw, prompts, tmp_path):
    path = prompts(ROWS[:2])
    first = draw("--prompts_file", path)
    assert first.code == cli.DONE
    assert any(line.startswith("seed ") for line in first.told)
    whole = pictures(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "manifests")
    assert draw("--prompts_file", path).code == cli.DONE
    assert pictures(tmp_path / "out") == whole


def test_rows_that_cannot_be_drawn_are_reported_and_the_others_drawn(job, run, tmp_path):
    bad = [
        {"prompt": "a cat"},
        {"prompt": "too many", "steps": 100000},
        {"prompt": "odd", "height": 17},
        {"prompt": 5},
        {"prompt": "no such", "sampler": "eulr"},
        {"prompt": "a dog"},
        {"prompt": "far", "index": 2**32 - 1, "id": "far"},
    ]
    outcome = job("--num_images", 2, rows=bad)
    assert outcome.code == cli.FAILED
    out = tmp_path / "out"
    assert sorted(pictures(out)) == [0, 1, 10, 11]
    failures = {f["row"]: f for f in map(json.loads, (out / "failures.jsonl").read_text().splitlines())}
    assert sorted(failures) == [1, 2, 3, 4, 6]
    assert "multiples of" in failures[2]["reason"]
    assert "did you mean euler" in failures[4]["reason"]
    assert failures[6]["id"] == "far" and "index" in failures[6]["reason"]
    outcome = run("--verify", out)
    assert outcome.code == cli.DONE
    outcome = run("--status", out)
    assert "failures  5" in [str(line) for line in outcome.paths]


def test_a_nan_is_one_picture_s_failure(job, run, tmp_path, load_once, model, monkeypatch):
    pipe = load_once(str(model), "float32", "shard_map")
    dispatch = pipe.dispatch

    def struck(requests, *rest):
        found = dispatch(requests, *rest)
        sound = [r.prompt != "a cat" for r in requests]
        return found._replace(
            finite=found.finite & np.array(sound + [True] * (len(found.finite) - len(sound)))
        )

    monkeypatch.setattr(pipe, "dispatch", struck)
    assert job().code == cli.FAILED
    out = tmp_path / "out"
    (failure,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert (failure["row"], failure["number"], failure["seed"], failure["index"]) == (1, 1, 7, 1)
    assert "NaN" in failure["reason"]
    assert sorted(pictures(out)) == [0, 2, 3, 4, 5, 6]
    assert run("--verify", out).code == cli.DONE


def test_a_failure_that_was_mended_is_taken_back(job, run, tmp_path, load_once, model, monkeypatch):
    pipe = load_once(str(model), "float32", "shard_map")
    dispatch, out = pipe.dispatch, tmp_path / "out"

    def struck(requests, *rest):
        found = dispatch(requests, *rest)
        return found._replace(finite=found.finite & False)

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "dispatch", struck)
        assert job().code == cli.FAILED
    assert (out / "failures.jsonl").exists() and len([*out.glob("failures/*")]) == 6
    for manifest in out.glob("manifests/*"):
        manifest.unlink()
    assert job().code == cli.DONE
    assert not (out / "failures.jsonl").exists() and not [*out.glob("failures/*")]
    assert run("--verify", out).code == cli.DONE


def test_a_job_without_standard_input(job, prompts, draw, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where it was closed
    assert job().code == cli.DONE
    assert draw("--prompts_file", "-").code == cli.MISTAKE


def test_weights_are_told_apart_wherever_they_lie(job, model, tmp_path, monkeypatch):
    """A shell leaves the ~ of --model=~/tiny as it is."""
    monkeypatch.setenv("HOME", str(model.parent))
    assert job(f"--model=~/{model.name}").code == cli.DONE
    there = json.loads((tmp_path / "out" / "job.json").read_text())
    shutil.rmtree(tmp_path / "out")
    assert job().code == cli.DONE
    here = json.loads((tmp_path / "out" / "job.json").read_text())
    assert there["fingerprint"]["weights"] == here["fingerprint"]["weights"]


def test_a_process_tells_of_its_own_part(job, monkeypatch):
    parts = []

    class Noted(bulk.Progress):
        def __init__(self, total, done):
            parts.append((total, done))
            super().__init__(total, done)

    monkeypatch.setattr(bulk, "Progress", Noted)
    assert job("--processes", 2, "--process_id", 1).code == cli.DONE
    assert job("--processes", 2, "--process_id", 1).code == cli.DONE
    assert job("--processes", 2, "--process_id", 0).code == cli.DONE
    (first, none), again, (second, nothing) = parts
    assert (none, nothing) == (0, 0) and again == (first, first) and first + second == len(ROWS)


def test_two_processes_share_the_shards(job, run, tmp_path):
    job()
    whole = pictures(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    first = job("--processes", 2, "--process_id", 1)
    assert first.code == cli.DONE
    assert run("--verify", tmp_path / "out").code == cli.FAILED, "half of the shards are open"
    second = job("--processes", 2, "--process_id", 0)
    assert not {path.name for path in first.paths} & {path.name for path in second.paths}
    assert pictures(tmp_path / "out") == whole
    assert run("--verify", tmp_path / "out").code == cli.DONE


def test_an_elastic_worker_draws_all_and_leaves_no_claim(job, tmp_path):
    job()
    whole = pictures(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert job("--elastic").code == cli.DONE
    assert pictures(tmp_path / "out") == whole
    assert list((tmp_path / "out" / "claims").iterdir()) == []


def test_verify_finds_what_is_wrong(job, run, tmp_path):
    out = tmp_path / "out"
    assert job().code == cli.DONE

    path = png_of(out, 0)
    sound = path.read_bytes()
    path.write_bytes(sound[:-20] + bytes(20))
    outcome = run("--verify", out)
    assert outcome.code == cli.FAILED
    assert "000000: picture 0 is damaged: its sha256 is another" in map(str, outcome.paths)
    path.unlink()
    outcome = run("--verify", out)
    assert outcome.code == cli.FAILED and "1 problems" not in str(outcome.paths[0])
    path.write_bytes(sound)
    assert run("--verify", out).code == cli.DONE

    manifest = out / "manifests" / "000001.json"
    text = manifest.read_text()
    doubled = json.loads(text)
    doubled["pictures"][0]["number"] = 0
    manifest.write_text(json.dumps(doubled))
    outcome = run("--verify", out)
    assert outcome.code == cli.FAILED
    assert "picture 0 is there 2 times" in map(str, outcome.paths)
    manifest.write_text(text[: len(text) // 2])
    outcome = run("--verify", out)
    assert "manifests/000001.json is damaged" in map(str, outcome.paths)
    for report in ("--merge", "--status"):
        outcome = run(report, out)
        assert outcome.code == cli.MISTAKE
        assert "manifests/000001.json is damaged; remove it, and" in outcome.told[-1]

    manifest.write_text(text)
    (out / "failures").mkdir()
    (out / "failures" / "000000.jsonl").write_text('{"row": 0')
    for report in ("--status", "--verify"):
        outcome = run(report, out)
        assert outcome.code == cli.MISTAKE
        assert "failures/000000.jsonl is damaged; remove it and" in outcome.told[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts_file", "none.txt"], "no such file"),
        (["--prompts_file", "F", "a cat"], "stand in the file"),
        (["--prompts_file", "F", "--frames", 3], "single pictures"),
        (["--prompts_file", "F", "--words"], "single pictures"),
        (["--prompts_file", "F", "--format", "webdatset"], "did you mean webdataset?"),
        (["--prompts_file", "F", "--process_id", 1], "--processes"),
        (["--prompts_file", "F", "--shard_size", 0], "out of range"),
        (
            ["--prompts_file", "F", "--lease", 5],
            "of claims, and there are none: write --elastic",
        ),
        (
            ["--prompts_file", "F", "--coordinator", "a:1"],
            "leave it out, or write --parallel jit",
        ),
        (["--format", "parquet", "a cat"], "--prompts_file"),
        (["--status", "D", "a cat"], "alone"),
        (["--status", "no/such/folder"], "no job"),
        (["--out", "x", "--verify", "D"], "alone"),
    ],
)
def test_mistakes_are_one_line(draw, run, prompts, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    argv = [str(prompts()) if a == "F" else a for a in argv]
    outcome = run(*argv) if "--status" in argv or "--verify" in argv else draw(*argv)
    assert outcome.code == cli.MISTAKE
    assert message in outcome.told[-1], outcome.told
    assert not pathlib.Path("no").exists()


def out_of_memory():
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes")


@pytest.fixture
def room(load_once, model, monkeypatch):
    """Devices with room for so many pictures; `late`: it shows when they are at work, not when they begin."""

    def room(pictures, late=False):
        pipe = load_once(str(model), "float32", "shard_map")
        dispatch, wait = pipe.dispatch, jax.block_until_ready
        too_many = []

        def limited(requests, contexts, settings):
            arrays = dispatch(requests, contexts, settings)
            if settings.batch_size > pictures:
                if not late:
                    raise out_of_memory()
                too_many.append(arrays[0])
            return arrays

        def limited_wait(arrays):
            if any(array is arrays[0] for array in too_many):
                raise out_of_memory()
            return wait(arrays)

        monkeypatch.setattr(pipe, "dispatch", limited)
        monkeypatch.setattr(jax, "block_until_ready", limited_wait)

    return room


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_out_of_memory_halves_the_batch_and_goes_on(job, run, tmp_path, room, late):
    rows = [{"prompt": f"a cat {i}"} for i in range(20)]
    flags = ("--batch_size", 8, "--shard_size", 10)
    whole = job("--batch_size", 2, "--shard_size", 10, "--out", tmp_path / "whole", rows=rows)
    assert whole.code == cli.DONE
    room(2, late)
    outcome = job(*flags, rows=rows)
    assert outcome.code == cli.DONE, outcome.told
    halved = [line for line in outcome.told if line.startswith("out of memory")]
    assert halved == [
        "out of memory at 16 x 16: 4 pictures a device from here on, not 8",
        "out of memory at 16 x 16: 2 pictures a device from here on, not 4",
    ]
    assert run("--verify", tmp_path / "out").code == cli.DONE
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole"), "as if 2 had been asked for"


def test_no_room_for_a_single_picture_is_one_line(job, tmp_path, room):
    room(0)
    outcome = job()
    assert outcome.code == cli.MISTAKE
    assert "out of memory with one picture of 16 x 16 a device; write" in outcome.told[-1]
