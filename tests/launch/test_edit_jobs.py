"""Jobs that change pictures: columns and flags, resumed and refused, what is compiled, and rows that fail."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from engine import finish
from engine.config import JobConfig
from engine.jobs import given
from engine.jobs.work import Worker
from engine.text.rows import read_rows
from engine.types import UserError
from launch import captioned, cli
from tests.compiled import COMPILED
from tests.launch.test_bulk import facts, pictures, png_of

STEPS = ("--steps", 4)
ROWS = [
    {"prompt": "a red fox"},
    {"prompt": "a cat", "image": "given/0.png"},
    {"prompt": "a dog", "image": "given/1.png", "mask": "given/half.png"},
    {"prompt": "a car", "image": "given/2.png", "strength": 0.5, "seed": 9},
    {"prompt": "two trees", "image": "given/wide.jpg", "height": 16, "guidance_scale": 3},
    {"prompt": "a blue car", "image": "given/3.png", "mask": "given/half.png", "guidance_scale": 2},
    {"prompt": "a green car", "image": "given/3.png", "strength": 0.75},
]


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def squares(seed, height=4, width=4):
    return (
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    )


@pytest.fixture(autouse=True)
def files(tmp_path):
    """Pictures beside the prompt file."""
    for i in range(4):
        save(tmp_path / "given" / f"{i}.png", squares(i))
    save(tmp_path / "given" / "wide.jpg", squares(9, width=8))
    half = np.zeros((16, 16), np.uint8)
    half[:8] = 255
    save(tmp_path / "given" / "half.png", half)
    return tmp_path / "given"


@pytest.fixture
def job(job):
    def edit_job(*argv, rows=ROWS):
        return job(*STEPS, *argv, rows=rows)

    return edit_job


def failures(out):
    return {one["row"]: one for one in map(json.loads, (out / "failures.jsonl").read_text().splitlines())}


def pixels(path):
    return np.asarray(Image.open(path))


def test_pictures_are_those_of_single_runs_bit_for_bit(job, draw, run, tmp_path):
    sixteen = "--batch_size", 16  # as many as prompts are encoded at once in a job
    outcome = job(*sixteen)
    assert outcome.code == cli.DONE, outcome.told
    out, found = tmp_path / "out", facts(tmp_path / "out")
    assert sorted(found) == list(range(len(ROWS)))
    for number, row in enumerate(ROWS):
        path = png_of(out, number)
        again = run("--like", path, "--out", tmp_path / "again")
        assert again.code == cli.DONE, again.told
        assert again.paths[0].read_bytes() == path.read_bytes(), row
        address = "--seed", row.get("seed", 7), "--first_index", 0 if "seed" in row else number
        flags = [
            part
            for name in ("strength", "guidance_scale", "height")
            if name in row
            for part in (f"--{name}", row[name])
        ]
        flags += [
            part for name in ("image", "mask") if name in row for part in (f"--{name}", tmp_path / row[name])
        ]
        alone = draw(row["prompt"], *STEPS, *sixteen, *address, *flags, "--out", tmp_path / "alone")
        np.testing.assert_array_equal(pixels(alone.paths[0]), pixels(path))
    np.testing.assert_array_equal(pixels(png_of(out, 2))[8:], squares(1)[8:])
    assert Image.open(png_of(out, 4)).size == (32, 16)
    assert "edit" not in found[0] and "image" not in finish.read_settings(png_of(out, 0))
    assert found[1]["edit"]["strength"] == 0.8 and found[2]["edit"]["strength"] == 1
    assert found[2]["edit"]["mask"] == str(tmp_path / "given" / "half.png")


def test_rows_are_drawn_with_those_of_the_same_program(job, load_once, tmp_path):
    """Strengths that take the same steps share theirs; another picture, mask or prompt compiles nothing."""
    strengths = [0.5, 0.6, 0.74, 0.75, 0.99, 1.0]
    rows = [
        {"prompt": f"a cat {i}", "image": f"given/{i % 4}.png", "strength": strengths[i % 6]}
        for i in range(12)
    ]
    rows += [{**row, "mask": "given/half.png"} for row in rows] + [{"prompt": "a dog"}, {"prompt": "a fox"}]
    load_once.cache_clear()
    assert job(rows=rows).code == cli.DONE
    groups = json.loads((tmp_path / "out" / "job.json").read_text())["groups"]
    told = [(one["rows"], one["settings"].get("mask"), one["settings"].get("intervals")) for one in groups]
    steps = [2, 3, 4]  # of strengths 0.5 to 0.74, 0.75 to 0.99, and 1
    assert told == [(n, m, s) for m in (False, True) for n, s in zip((6, 4, 2), steps, strict=True)] + [
        (2, None, None)
    ]
    save(tmp_path / "given" / "0.png", squares(77))
    before = COMPILED.copy()
    others = [row | {"prompt": f"{row['prompt']} at night"} for row in rows]
    assert job("--out", tmp_path / "other", rows=others).code == cli.DONE
    assert before == COMPILED
    remembered = finish.read_settings(png_of(tmp_path / "out", 2))
    assert remembered["strength"] == 0.74


def test_a_job_that_was_interrupted_goes_on(job, run, tmp_path, monkeypatch):
    whole = job("--out", tmp_path / "whole")
    assert whole.code == cli.DONE
    put, done = Worker._put, []

    def stopped(self, shard, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard.name)
        put(self, shard, *rest)

    monkeypatch.setattr(Worker, "_put", stopped)
    assert job().code == cli.STOPPED
    monkeypatch.setattr(Worker, "_put", put)
    outcome = job()
    assert outcome.code == cli.DONE and any("2 shards are done" in line for line in outcome.told)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")
    assert run("--verify", tmp_path / "out").code == cli.DONE


def test_a_job_of_other_pictures_is_refused(job, tmp_path, files):
    assert job().code == cli.DONE
    sound = (files / "1.png").read_bytes()
    for change, difference in [
        (lambda: job("--strength", 0.6), "strength None there and 0.6 here"),
        (lambda: job("--image_guidance_scale", 3), "image_guidance_scale 1.5 there and 3.0 here"),
        (lambda: job(rows=[ROWS[0], ROWS[1] | {"strength": 0.7}, *ROWS[2:]]), "other rows"),
        (lambda: job("--mask", files / "half.png"), "other pictures to change"),
        (lambda: job("--image", files / "0.png"), "other pictures to change"),
        (lambda: (save(files / "1.png", squares(1) ^ 1), job())[1], "other pictures to change"),
        (lambda: ((files / "1.png").unlink(), job())[1], "other pictures to change"),
    ]:
        outcome = change()
        assert outcome.code == cli.MISTAKE
        assert difference in outcome.told[-1] and "another job" in outcome.told[-1]
    (files / "1.png").write_bytes(sound)
    os.utime(files / "1.png", (1, 1))
    assert job().code == cli.DONE, "the same contents are the same picture, however old"


def test_flags_stand_for_what_rows_leave_open(job, tmp_path, files):
    rows = [
        {"prompt": "a fox"},
        {"prompt": "a cat", "image": "given/1.png"},
        {"prompt": "a dog", "mask": "given/half.png", "strength": 0.75},
        {"prompt": "a car", "image": ""},
        {"prompt": "a tree", "mask": ""},
    ]
    out = tmp_path / "out"
    assert job("--image", files / "0.png", "--strength", 0.5, rows=rows).code == cli.DONE
    edits = [facts(out)[number].get("edit") for number in range(5)]
    own = {"strength": 0.5, "image_guidance_scale": 1.5}
    first = {"image": str(files / "0.png")}
    assert edits[0] == edits[4] == first | own
    assert edits[1] == own | {"image": str(files / "1.png")}
    assert edits[2] == own | first | {"mask": str(files / "half.png"), "strength": 0.75}
    assert edits[3] is None
    masked = job("--mask", files / "half.png", "--out", tmp_path / "masked", rows=rows[1:2])
    assert masked.code == cli.DONE
    np.testing.assert_array_equal(pixels(png_of(tmp_path / "masked", 0))[8:], squares(1)[8:])


def test_paths_go_from_the_folder_of_the_file_on(job, run, tmp_path, monkeypatch):
    """Wherever the command is called; what pictures remember can be opened from there."""
    assert job().code == cli.DONE
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = job("--prompts_file", "../prompts.jsonl", "--out", tmp_path / "moved")
    assert moved.code == cli.DONE, moved.told
    path = png_of(tmp_path / "moved", 1)
    assert finish.read_settings(path)["image"] == "../given/0.png"
    np.testing.assert_array_equal(pixels(path), pixels(png_of(tmp_path / "out", 1)))
    assert run("--like", path, "--out", tmp_path / "again").code == cli.DONE


def test_rows_that_cannot_be_drawn_are_reported_and_the_others_drawn(job, run, tmp_path, files):
    (files / "text.png").write_text("no picture")
    save(files / "small.png", np.zeros((8, 16), np.uint8))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = save(files / "cut.png", noise)
    cut.write_bytes(cut.read_bytes()[:6000])
    (tmp_path.parent / "secret.png").write_bytes((files / "0.png").read_bytes())
    os.symlink(tmp_path.parent / "secret.png", files / "link.png")
    os.mkfifo(files / "pipe.png")
    bad = [
        (
            {"image": "given/none.png"},
            "given/none.png: No such file or directory; write the file of a picture",
        ),
        ({"image": "given"}, "given: Is a directory; write the file of a picture"),
        (
            {"image": "given/text.png"},
            "text.png: damaged, or none of PNG, JPEG, WEBP; write a PNG, JPEG or WebP",
        ),
        ({"image": "given/pipe.png"}, "pipe.png: no file; write a PNG"),
        ({"image": "given/link.png"}, "image='given/link.png' leads out of the folder"),
        ({"image": "../secret.png"}, "image='../secret.png' leads out of the folder"),
        ({"image": "~/a.png"}, "/~/a.png: No such file"),
        ({"image": "given/0.png", "mask": "given/small.png"}, "small.png has 16 x 8 pixels, and the picture"),
        ({"image": "given/0.png", "mask": "given/none.png"}, "none.png: No such file"),
        ({"mask": "given/half.png"}, "mask=given/half.png without a picture: write its image, too"),
        ({"strength": 0.5}, "strength=0.5 without a picture: write its image, too"),
        ({"image": "given/0.png", "strength": 2}, "strength=2.0: write a number above 0 and up to 1"),
        ({"image": "given/0.png", "strength": 0.2}, "strength=0.2 takes none of 4 steps: write 0.25 or more"),
        ({"image": "given/cut.png"}, "given/cut.png: damaged: "),
    ]
    rows = [
        {"prompt": "a fox"},
        *({"prompt": "a cat"} | row for row, _ in bad),
        {"prompt": "a dog", "image": "given/0.png"},
    ]
    outcome = job("--num_images", 2, rows=rows)
    assert outcome.code == cli.FAILED, outcome.told
    early = [line for line in outcome.told if line.startswith("warning: 13 of 16 rows cannot be drawn")]
    assert early and "the first is row 1 (id 1): " in early[0] and "none.png" in early[0]
    out = tmp_path / "out"
    found = failures(out)
    assert sorted(found) == list(range(1, 15))
    for number, (_, message) in enumerate(bad, 1):
        assert message in found[number]["reason"], number
        assert "\n" not in found[number]["reason"]
    assert sorted(pictures(out)) == [0, 1, 30, 31]
    assert found[14]["number"] == 29, "what is broken inside is known when it is about to be drawn"
    assert run("--verify", out).code == cli.DONE


def test_a_picture_that_goes_is_one_picture_s_failure(job, run, tmp_path, files, monkeypatch):
    begin, rows = Worker.run, [{"prompt": f"a cat {i}", "image": f"given/{i}.png"} for i in range(4)]

    def without(self, shards):
        (files / "2.png").unlink()
        return begin(self, shards)

    monkeypatch.setattr(Worker, "run", without)
    assert job(rows=rows).code == cli.FAILED
    assert sorted(pictures(tmp_path / "out")) == [0, 1, 3]
    assert "2.png: No such file" in failures(tmp_path / "out")[2]["reason"]
    assert run("--verify", tmp_path / "out").code == cli.DONE


def test_trouble_that_passes_is_waited_for(job, tmp_path, monkeypatch):
    assert job("--out", tmp_path / "whole").code == cli.DONE
    read, tries = given._read, []

    def fails_first(paths, *shape):
        tries.append(paths.image)
        if len(tries) == 1:
            raise OSError(5, "Input/output error")
        return read(paths, *shape)

    monkeypatch.setattr(given, "_read", fails_first)
    outcome = job()
    assert outcome.code == cli.DONE, outcome.told
    told = ".png: Input/output error; trying again for up to 60 s"  # of whichever was read first
    assert any(told in line for line in outcome.told)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(given, "_read", fails)
    outcome = job("--patience", 0, "--out", tmp_path / "stopped")
    assert outcome.code == cli.PASSING
    assert "cannot be read: Input/output error; once that is mended, the same command" in outcome.told[-1]
    monkeypatch.setattr(given, "_look", fails)
    outcome = job("--out", tmp_path / "none")
    assert outcome.code == cli.PASSING and not (tmp_path / "none" / "job.json").exists()
    assert "cannot be read: Input/output error; once that is mended, the same command" in outcome.told[-1]


def test_a_picture_is_read_when_it_is_drawn_and_once_for_rows_that_share_it(
    job, tmp_path, files, monkeypatch
):
    read, tries = given._read, []

    def counted(paths, *shape):
        tries.append(os.path.basename(paths.image))
        return read(paths, *shape)

    monkeypatch.setattr(given, "_read", counted)
    rows = [{"prompt": f"a cat {i}"} for i in range(8)]
    assert job("--image", files / "0.png", rows=rows).code == cli.DONE
    assert tries == ["0.png"]
    tries.clear()
    rows = [{"prompt": f"a cat {i}", "image": f"given/{i}.png"} for i in range(4)]
    assert job("--num_images", 2, "--out", tmp_path / "two", rows=rows).code == cli.DONE
    assert sorted(tries) == ["0.png", "1.png", "2.png", "3.png"]
    assert job("--num_images", 2, "--out", tmp_path / "two", rows=rows).code == cli.DONE
    assert len(tries) == 4, "none where all is done"


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_formats_say_what_pictures_were_made_of(job, run, tmp_path, format):
    assert job("--format", format).code == cli.DONE
    assert run("--verify", tmp_path / "out").code == cli.DONE
    index = run("--merge", tmp_path / "out").paths[0]
    lines = {line["number"]: line for line in map(json.loads, index.read_text().splitlines())}
    assert lines[3]["edit"] == {
        "image": str(tmp_path / "given" / "2.png"),
        "strength": 0.5,
        "image_guidance_scale": 1.5,
    }
    if format == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        rows = [
            row for path in (tmp_path / "out" / "shards").iterdir() for row in pq.read_table(path).to_pylist()
        ]
        told = {row["number"]: row["edit"] and json.loads(row["edit"]) for row in rows}
        assert told == {number: line.get("edit") for number, line in lines.items()}


def test_mistakes_of_flags_are_one_line(job, files, tmp_path):
    words = [{"prompt": "a fox"}]
    for flags, message in (
        (
            ("--strength", 0.5),
            "strength=0.5 without a picture: write --image FILE, or a column image in the rows",
        ),
        (
            ("--mask", files / "half.png"),
            "without a picture: write --image FILE, or a column image in the rows",
        ),
        (("--image", files / "none.png"), "none.png: No such file or directory; write the file of a picture"),
        (("--mask", files / "none.png"), "none.png: No such file or directory; write the file of a picture"),
        (("--image", files / "0.png", "--mask", files / "wide.jpg"), "wide.jpg has 32 x 16 pixels, and the"),
        (("--image", files / "0.png", "--strength", 2), "strength=2.0: write a number above 0 and up to 1"),
    ):
        outcome = job(*flags, rows=words)
        assert outcome.code == cli.MISTAKE, flags
        assert message in outcome.told[-1], outcome.told
        assert not (tmp_path / "out" / "job.json").exists()


def test_evaluations_draw_the_same_pictures(job, prompts, tmp_path, model, load_once):
    assert job("--batch_size", 2).code == cli.DONE
    pipe = load_once(str(model), "float32", "shard_map")
    config = JobConfig(prompts_file=str(prompts(ROWS)), seed=7, steps=4, batch_size=2)
    with read_rows(config.prompts_file, None) as rows:
        found = captioned.drawn(config, rows, None, pipe)
        drawn = {
            text: image for images, texts in found.batches for image, text in zip(images, texts, strict=True)
        }
        for number, row in enumerate(ROWS):
            np.testing.assert_array_equal(drawn[row["prompt"]], pixels(png_of(tmp_path / "out", number)))
        found = captioned.drawn(config, rows, None, pipe)
        shutil.rmtree(tmp_path / "given")
        with pytest.raises(UserError, match=r"row \d \(id \d\) cannot be drawn: .*No such file"):
            list(found.batches)
        with pytest.raises(UserError, match=r"row 1 \(id 1\) cannot be drawn: .*No such file"):
            captioned.drawn(config, rows, None, pipe)
