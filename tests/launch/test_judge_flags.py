"""--judge and --best_of: runs and jobs keep the best, tell its score, and draw it again by its index."""

import json
import re

import numpy as np
import pytest

from engine import finish
from launch import cli, evaluate
from tests.instruments import tiny_clip
from tests.launch.test_edit_flags import pixels

N = 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def manifests(folder):
    files = sorted(folder.glob("manifests/*.json"))
    return [one for file in files for one in json.loads(file.read_text())["pictures"]]


def scores_of(told):
    return [float(each) for line in told for each in re.findall(r"CLIP score (-?[\d.]+)", line)]


def test_the_best_is_written_told_and_drawn_again_by_its_index(draw, run, clip, tmp_path):
    flags = ("a red fox", "--seed", 3)
    every = draw(*flags, "--judge", clip, "--num_images", N, "--out", tmp_path / "every")
    scores = scores_of(every.told)
    assert len(scores) == N and np.ptp(scores) > 0.1
    done = draw(*flags, "--judge", clip, "--best_of", N)
    best = int(np.argmax(scores))
    assert [path.name for path in done.paths] == [f"{best:05d}-a-red-fox.png"]
    assert f"{done.paths[0].name}: CLIP score {scores[best]:.2f}, the best of {N}" in done.told
    assert done.paths[0].read_bytes() == every.paths[best].read_bytes()
    settings = finish.read_settings(done.paths[0])
    assert settings["index"] == best
    assert not {"judge", "best_of"} & (settings.keys() | settings["contents"].keys())
    (again,) = run("--like", done.paths[0], "--out", tmp_path / "again").paths
    assert again.read_bytes() == done.paths[0].read_bytes()


def test_several_pictures_have_candidates_of_their_own(draw, clip):
    done = draw("a red fox", "a blue car", "--seed", 3, "--judge", clip, "--best_of", 3, "--num_images", 2)
    indices = [finish.read_settings(path)["index"] for path in done.paths[:4]]
    assert [index // 3 for index in indices] == [0, 1, 2, 3]
    assert len(scores_of(done.told)) == 4


def test_strips_and_words_are_of_the_picture_that_is_kept(draw, clip, tmp_path):
    flags = ("a red fox", "--seed", 3, "--steps", 3, "--frames", 2, "--words")
    best = draw(*flags, "--judge", clip, "--best_of", N).paths
    index = finish.read_settings(best[0])["index"]
    plain = draw(*flags, "--first_index", index, "--out", tmp_path / "plain").paths
    assert [path.read_bytes() for path in best] == [path.read_bytes() for path in plain]


def test_progress_counts_the_candidates(draw, clip):
    done = draw("a red fox", "a cat", "a dog", "--seed", 3, "--judge", clip, "--best_of", N)
    batches = [line for line in done.told if line.startswith("batch")]
    assert [line.partition(" images")[0] for line in batches] == ["batch 1/2: 2/3", "batch 2/2: 3/3"]


def test_a_job_keeps_the_best_of_each_row(draw, job, clip, tmp_path):
    rows = [
        {"prompt": "a red fox"},
        {"prompt": "a blue car", "seed": 5, "index": 40},
        {"prompt": "a cat", "seed": 5},
        {"prompt": "a dog", "width": 24},
        {"prompt": "two trees", "index": 2**32 - 2},
    ]
    done = job("--judge", clip, "--best_of", N, rows=rows)
    assert done.code == cli.FAILED
    found = {one["row"]: one for one in manifests(tmp_path / "out")}
    assert found.keys() == {0, 1, 2, 3}
    firsts = {0: 0, 1: 40, 2: 0, 3: 3 * N}
    for row, one in found.items():
        options = ("--seed", rows[row].get("seed", 7), "--first_index", firsts[row], "--num_images", N)
        size = ("--width", 24) if row == 3 else ()
        out = tmp_path / f"{row}"
        every = draw(rows[row]["prompt"], *options, *size, "--judge", clip, "--out", out)
        scores = scores_of(every.told)
        assert one["index"] == firsts[row] + int(np.argmax(scores))
        assert one["clip_score"] == pytest.approx(max(scores), abs=0.01)
        prompts = {finish.read_settings(file)["prompt"]: file for file in (tmp_path / "out").rglob("*.png")}
        path = prompts[rows[row]["prompt"]]
        assert finish.read_settings(path)["index"] == one["index"]
        np.testing.assert_array_equal(pixels(path), pixels(every.paths[int(np.argmax(scores))]))
    (failure,) = map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
    assert failure["row"] == 4 and "beyond 4294967295" in failure["reason"]


def test_a_job_with_another_judge_or_number_is_another(job, clip, tmp_path):
    rows = [{"prompt": "a red fox"}, {"prompt": "a cat"}]
    assert job("--judge", clip, "--best_of", 2, rows=rows).code == cli.DONE
    assert job("--judge", clip, "--best_of", 2, rows=rows).code == cli.DONE
    other = job("--judge", clip, "--best_of", 3, rows=rows)
    assert other.code == cli.MISTAKE and "best_of 2 there and 3 here" in other.told[-1]
    without = job(rows=rows)
    assert without.code == cli.MISTAKE and "judge" in without.told[-1]


def test_parquet_has_the_scores(job, clip, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    job("--judge", clip, "--format", "parquet", rows=[{"prompt": "a red fox"}, {"prompt": "a cat"}])
    (file,) = (tmp_path / "out").rglob("*.parquet")
    table = parquet.read_table(file).to_pylist()
    assert [one["clip_score"] for one in table] == [one["clip_score"] for one in manifests(tmp_path / "out")]
    job("--format", "parquet", "--out", tmp_path / "plain", rows=[{"prompt": "a cat"}])
    (file,) = (tmp_path / "plain").rglob("*.parquet")
    assert "clip_score" not in parquet.read_table(file).column_names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--best_of", 2), "best_of=2 without one who chooses: write --judge FOLDER, too"),
        (("--best_of", 0, "--judge", "here"), "best_of=0 is out of range; write 1 to 1000"),
        (("--judge", "nowhere"), "nowhere is no CLIP: looked for config.json"),
        (
            ("--judge", "here", "--best_of", 9, "--first_index", 2**32 - 8),
            "first_index=4294967288: 9 pictures would go beyond 4294967295",
        ),
    ],
)
def test_mistakes_are_one_line(draw, flags, message):
    done = draw("a fox", *flags)
    assert done.code == cli.MISTAKE and len(done.told) == 1 and message in done.told[0]


def test_evaluation_is_of_the_best(model, prompts, clip, tmp_path, capsys):
    def score(*flags):
        argv = ["--model", model, "--prompts_file", prompts([{"prompt": "a red fox"}, {"prompt": "a cat"}])]
        argv += ["--clip", clip, "--steps", 2, "--batch_size", 2, "--out", tmp_path / "out", *flags]
        assert cli.exit_code(evaluate.main, [str(arg) for arg in argv]) == cli.DONE
        capsys.readouterr()
        report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        return report["clip_score"], report["settings"]

    plain, without = score()
    best, settings = score("--judge", clip, "--best_of", 4)
    assert best > plain and settings["best_of"] == 4 and settings["judge"] == str(clip)
    assert not {"judge", "best_of"} & without.keys()
