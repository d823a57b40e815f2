"""Jobs among mistakes and mishaps: others' folders, models beside jobs, too little memory for a row."""

import json
import shutil

import jax
import pytest
from PIL import Image

from engine.jobs import digests
from engine.jobs.account import out_of_memory_or_raise
from launch import cli


def out_of_memory():
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes")


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "of another program"])
def test_out_of_memory_is_told_from_other_errors(wrapped):
    """On CPUs, a program that waits for one that had too little tells of it so."""
    told = "INTERNAL: Error dispatching computation: Out of memory allocating 23038734120 bytes."
    out_of_memory_or_raise(jax.errors.JaxRuntimeError(told) if wrapped else out_of_memory())
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        out_of_memory_or_raise(jax.errors.JaxRuntimeError("INTERNAL: another mistake"))


def test_shards_without_a_job_are_not_taken_for_those_of_another(job, run, tmp_path):
    assert job(rows=[{"prompt": "a red fox"}]).code == cli.DONE
    (tmp_path / "out" / "job.json").rename(tmp_path / "job.json")
    other = job(rows=[{"prompt": "a dog"}])
    assert other.code == cli.MISTAKE and "has shards, and no job.json" in other.told[-1]
    assert not (tmp_path / "out" / "job.json").exists()
    (tmp_path / "job.json").rename(tmp_path / "out" / "job.json")
    assert job(rows=[{"prompt": "a red fox"}]).code == cli.DONE
    manifest = tmp_path / "out" / "manifests" / "000000.json"
    told = json.loads(manifest.read_text())
    told["pictures"][0]["number"] = 5
    manifest.write_text(json.dumps(told))
    verified = run("--verify", tmp_path / "out")
    assert verified.code != cli.DONE and any("are of another job" in str(line) for line in verified.paths)


def test_what_lies_in_the_folder_of_a_model_makes_no_other_of_it(run, model, prompts, tmp_path):
    """Not the job itself, a prompt file or a LoRA; nor does a link to nothing stop it."""
    own = shutil.copytree(model, tmp_path / "own")
    before = digests.of_weights(own)
    assert before == digests.of_weights(model)
    (own / "prompts.txt").write_text("a red fox")
    (own / "out" / "manifests").mkdir(parents=True)
    (own / "out" / "job.json").write_text("{}")
    (own / "unet" / "old.safetensors").symlink_to(tmp_path / "nothing")
    assert digests.of_weights(own) == before
    (own / "unet" / "config.json").write_text("{}")
    assert digests.of_weights(own) != before


@pytest.mark.parametrize(
    ("flags", "rows", "message"),
    [
        (["--negative_prompt", "b\udcff"], None, "is not Unicode text"),
        (["--image_guidance_scale", 9], None, "image_guidance_scale=9.0 without a picture"),
    ],
)
def test_a_mistake_leaves_no_job_behind(job, tmp_path, flags, rows, message):
    refused = job(*flags)
    assert refused.code == cli.MISTAKE and message in refused.told[-1]
    assert job().code == cli.DONE


def test_a_row_that_is_told_how_to_keep_to_no_picture(job, tmp_path):
    outcome = job(rows=[{"prompt": "a fox", "image_guidance_scale": 2.0}, {"prompt": "a cat"}])
    assert outcome.code == cli.FAILED
    (failure,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert "image_guidance_scale=2.0 without a picture: write its image, too" in failure


def test_a_row_too_large_for_memory_stops_no_others(job, run, load_once, model, tmp_path, monkeypatch):
    pipe = load_once(str(model), "float32", "shard_map")
    dispatch = pipe.dispatch

    def limited(requests, contexts, settings):
        if settings.height > 16:
            raise out_of_memory()
        return dispatch(requests, contexts, settings)

    monkeypatch.setattr(pipe, "dispatch", limited)
    large = {"height": 32, "width": 32}
    rows = [
        {"prompt": "a fox"},
        {"prompt": "a cat"} | large,
        {"prompt": "a dog"},
        {"prompt": "a car"} | large,
    ]
    outcome = job("--batch_size", 2, rows=rows)
    assert outcome.code == cli.FAILED
    found = list(map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines()))
    reason = "out of memory with one picture of 32 x 32 a device; write a smaller size"
    assert [(each["row"], each["reason"]) for each in found] == [(1, reason), (3, reason)]
    assert run("--verify", tmp_path / "out").code == cli.DONE
    assert sum("such rows are not drawn" in line for line in outcome.told) == 1
    assert job("--batch_size", 2, rows=rows).code == cli.FAILED  # all is done, and still known


def test_a_manifest_tells_the_size_of_the_file(job, tmp_path):
    assert job("--upscale", 3, "--format", "files", rows=[{"prompt": "a fox"}]).code == cli.DONE
    (picture,) = json.loads((tmp_path / "out" / "manifests" / "000000.json").read_text())["pictures"]
    (file,) = (tmp_path / "out").rglob("*.png")
    assert (picture["width"], picture["height"]) == Image.open(file).size == (48, 48)
