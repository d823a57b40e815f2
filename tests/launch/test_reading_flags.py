"""--prompt_weights and --long_prompts: remembered in pictures and jobs, and rows drawn as they are alone."""

import json

import numpy as np
import pytest
from PIL import Image

from engine import finish
from engine.train.sources import open_source
from engine.train.sources.pictures import Pictures
from launch import captioned, cli

LONG = "a red fox at night, a blue car"  # two parts
MARKED = "a (red:1.5) fox [at] night"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def warnings(outcome):
    return [line for line in outcome.told if line.startswith("warning")]


def test_weights_change_the_picture_which_remembers_them(draw, run, tmp_path):
    (letters,) = draw(MARKED, "--seed", 3).paths
    marked = draw(MARKED, "--seed", 3, "--prompt_weights")
    (path,) = marked.paths
    assert np.abs(pixels(letters) - pixels(path)).mean() > 1
    assert warnings(marked) == []  # no word that the model never saw
    settings = finish.read_settings(path)
    assert settings["prompt_weights"] is True and settings["prompt"] == MARKED
    assert "prompt_weights" not in finish.read_settings(letters) and "long_prompts" not in settings
    (again,) = run("--like", path, "--out", tmp_path / "again").paths
    assert again.read_bytes() == path.read_bytes()
    (without,) = run("--like", path, "--noprompt_weights", "--out", tmp_path / "without").paths
    np.testing.assert_array_equal(pixels(without), pixels(letters))


def test_a_job_tells_of_prompts_that_are_cut_once(job):
    rows = [{"prompt": "a cat"}, {"prompt": LONG}, {"prompt": "a dog", "negative_prompt": LONG}]
    first, last = warnings(job("--num_images", 2, rows=rows))
    assert first.startswith("warning: row 1: prompt too long") and first.endswith(
        "--long_prompts reads them, too"
    )
    assert last == "warning: 4 pictures have prompts that were too long to be read to their end"


def test_a_job_that_reads_all_tells_nothing(job):
    assert warnings(job("--long_prompts", rows=[{"prompt": "a cat"}, {"prompt": LONG}])) == []


def test_long_prompts_are_read_and_not_cut(draw, run, tmp_path):
    cut = draw(LONG, "--seed", 3)
    (warning,) = warnings(cut)
    assert warning.startswith("warning: prompt too long") and warning.endswith(
        "; --long_prompts reads them, too"
    )
    whole = draw(LONG, "--seed", 3, "--long_prompts", "--words")
    path, sheet = whole.paths
    assert warnings(whole) == [] and sheet.name.endswith(".words.png")
    assert np.abs(pixels(cut.paths[0]) - pixels(path)).mean() > 1
    (again,) = run("--like", path, "--out", tmp_path / "again").paths
    np.testing.assert_array_equal(pixels(again), pixels(path))


def test_progress_counts_batches_of_one_length(draw):
    done = draw("a fox", LONG, "a cat", "a dog", "--seed", 3, "--long_prompts", "--batch_size", 2)
    # on eight devices there would be one batch of each length
    assert [line.split(":")[0] for line in done.told] == ["batch 1/3", "batch 2/3", "batch 3/3"]
    assert done.told[-1].startswith("batch 3/3: 4/4 images")


ROWS = [
    {"prompt": "a (fox:1.5)"},
    {"prompt": LONG},
    {"prompt": "a cat", "negative_prompt": LONG},
    {"prompt": "a dog", "negative_prompt": LONG, "guidance_scale": 1},
    {"prompt": f"{LONG} BREAK {LONG}"},
    {"prompt": "a cat above a dog"},
]


def test_rows_of_a_job_are_as_they_are_alone(job, draw, tmp_path):
    flags = ("--prompt_weights", "--long_prompts")
    assert job("--format", "files", *flags, rows=ROWS).code == cli.DONE
    groups = json.loads((tmp_path / "out" / "job.json").read_text())["groups"]
    assert [(group["rows"], group["settings"]["parts"], group["settings"]["guided"]) for group in groups] == [
        *((2, 1, True), (2, 2, True), (1, 1, False), (1, 4, True)),
    ]
    paths = {finish.read_settings(path)["index"]: path for path in (tmp_path / "out").rglob("*.png")}
    assert sorted(paths) == [*range(len(ROWS))]
    for index, row in enumerate(ROWS):
        own = [
            part
            for name in ("negative_prompt", "guidance_scale")
            if name in row
            for part in (f"--{name}", row[name])
        ]
        place = ("--seed", 7, "--first_index", index, "--out", tmp_path / f"single{index}")
        (single,) = draw(row["prompt"], *own, *flags, *place).paths
        # A job encodes its words in batches of another size.
        assert np.abs(pixels(paths[index]) - pixels(single)).max() <= 1


FOX = "a (red:1.5) fox BREAK at [night]"


@pytest.mark.parametrize("format", ["files", "webdataset", "arrayrecord", "parquet"])
def test_who_trains_on_a_job_reads_its_words_without_marks(job, tmp_path, format):
    """And so does who judges its pictures by their captions."""
    rows = [{"prompt": FOX}, {"prompt": "a cat"}]
    flags = ("--prompt_weights", "--long_prompts")
    assert job("--format", format, *flags, "--shard_size", 1, rows=rows).code == cli.DONE
    source = open_source(str(tmp_path / "out" / "shards"), format)
    pictures = Pictures([source])
    captions = {pictures.caption(number) for number in range(len(pictures))}
    words = "a red fox       at night"  # where BREAK stood
    assert captions == {words, "a cat"}
    (first, _), (second, _) = (
        (told, images) for images, told in captioned.found(str(tmp_path / "out")).batches
    )
    assert {*first, *second} == {words, "a cat"}
    manifests = sorted((tmp_path / "out" / "manifests").glob("*.json"))
    told = [one for file in manifests for one in json.loads(file.read_text())["pictures"]]
    assert {one["prompt"] for one in told} == {FOX, "a cat"}


@pytest.mark.parametrize("flag", ["--prompt_weights", "--long_prompts"])
def test_a_job_is_that_of_its_reading(job, flag):
    rows = [{"prompt": "a fox"}]
    assert job(flag, rows=rows).code == cli.DONE
    refused = job(rows=rows)
    assert refused.code == cli.MISTAKE
    assert "another job" in refused.told[-1] and f"{flag[2:]} True there" in refused.told[-1]
