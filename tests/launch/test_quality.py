"""python -m launch.evaluate for FID and CLIP score: drawn pictures, those of jobs, those of any folder."""

import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import engine
from engine import finish
from engine.evaluate import fid, frechet
from engine.evaluate import sheet as sheets
from engine.evaluate.clip_score import ClipScorer
from launch import cli, evaluate, judging, quality
from tests.instruments import random_inception, tiny_clip
from tests.jobs.s3_server import s3, s3_server  # noqa: F401
from tests.launch.conftest import ROWS, Outcome
from tests.tiny import compiled_quickly

SEED, STEPS = 7, 2
FORMATS = ["files", "webdataset", "arrayrecord", "parquet"]


def test_help_names_every_flag():
    named = {name for group in (*evaluate.FLAGS.values(), *quality.FLAGS.values()) for name in group}
    assert named == {**evaluate.KINDS, **quality.KINDS}.keys()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    file = random_inception(tmp_path_factory.mktemp("inception") / "inception.safetensors")
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def features_once():
    """Features with a memory: the network is compiled for one test only."""

    @functools.cache
    def features(weights):
        return fid.Features(weights, batch_size=2)

    with compiled_quickly():
        yield features


@pytest.fixture
def measure(load_once, features_once, monkeypatch, capsys, tmp_path):
    """python -m launch.evaluate with these arguments, into the folder `results`."""
    monkeypatch.setattr(engine, "load", load_once, raising=False)
    monkeypatch.setattr(judging, "Features", features_once)
    monkeypatch.chdir(tmp_path)

    def measure(*argv: object) -> Outcome:
        capsys.readouterr()
        code = cli.exit_code(evaluate.main, [str(arg) for arg in argv])
        said, told = capsys.readouterr()
        return Outcome(code, said.splitlines(), told.splitlines())

    return measure


@pytest.fixture
def of_model(measure, model, prompts, clip):
    """The same with CLIP, the tiny model and the rows of `job`."""

    def of_model(*argv: object, rows=ROWS) -> Outcome:
        how = ("--model", model, "--steps", STEPS, "--batch_size", 2, "--seed", SEED, "--clip", clip)
        return measure("--prompts_file", prompts(rows), *how, *argv)

    return of_model


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def report(tmp_path):
    return json.loads((tmp_path / "results" / "evaluation.json").read_text())


FIGURES = ("pictures", "left_out", "fid", "clip_score", "clip_score_standard_error", "captions_cut")


def figures(tmp_path):
    found = report(tmp_path)
    return {name: found[name] for name in FIGURES if name in found}


def test_drawn_pictures_have_the_figures_of_their_job(
    of_model, measure, job, clip, inception, features_once, photographs, tmp_path
):
    """And those that are made step by step; and statistics in a file are those of the folder."""
    fid_flags = ("--inception", inception, "--reference")
    drawn = of_model(*fid_flags, photographs, "--save_reference", tmp_path / "stats.npz")
    assert drawn.code == cli.DONE, drawn.told
    whole = report(tmp_path)
    assert (whole["pictures"], whole["left_out"], whole["reference_pictures"]) == (7, 0, 3)
    assert whole["settings"]["seed"] == SEED and whole["settings"]["sampler"] == "dpmpp_2m"
    assert whole["versions"]["fogsculpt"] == engine.__version__ and whole["devices"]["count"] >= 1
    assert whole["settings"]["clip"] == str(clip) and whole["date"].startswith("20")
    assert any("the judged pictures are 7, for 2048 features" in line for line in drawn.told)

    assert job("--format", "webdataset").code == cli.DONE
    there = ("--clip", clip, *fid_flags, tmp_path / "stats.npz")
    again = measure("--pictures", tmp_path / "out", *there)
    assert again.code == cli.DONE, again.told
    assert figures(tmp_path) == pytest.approx({name: whole[name] for name in FIGURES}, rel=1e-5)

    files = sorted((tmp_path / "again").glob("*")) or unpacked(tmp_path / "out", tmp_path / "again")
    images = [np.asarray(Image.open(file)) for file in files]
    captions = [finish.read_settings(file)["prompt"] for file in files]
    network = features_once(str(inception))
    distance = frechet.frechet_distance(
        network.moments([image[None] for image in images]), network.folder_moments(photographs)
    )
    assert whole["fid"] == pytest.approx(distance, rel=1e-3)
    scores = ClipScorer(clip).score([(images, captions)])
    assert whole["clip_score"] == pytest.approx(scores.mean, rel=1e-4)
    assert whole["captions_cut"] == scores.truncated

    table = {line.split("  ")[0]: line for line in drawn.paths}
    assert "7" in table["pictures"] and f"{whole['fid']:.3f}" in table["FID"]
    assert f"{whole['clip_score']:.3f}" in table["CLIP score"]


def test_what_less_work_costs(of_model, tmp_path):
    """The way to draw is as in launch.generate, and the report says which it was."""
    scores = []
    for way in ((), ("--cache_interval", 2, "--guidance_end", 0.5, "--quantize", "int8")):
        drawn = of_model("--num_prompts", 2, *way)
        assert drawn.code == cli.DONE, drawn.told
        scores.append(report(tmp_path)["clip_score"])
    said = report(tmp_path)["settings"]
    assert (said["cache_interval"], said["guidance_end"], said["quantize"]) == (2, 0.5, "int8")
    assert scores[0] != scores[1]


def unpacked(out, into):
    for tar in sorted((out / "shards").glob("*.tar")):
        shutil.unpack_archive(tar, into)
    return sorted(into.glob("*.png"))


def test_formats_of_jobs(of_model, measure, job, clip, tmp_path):
    assert of_model().code == cli.DONE
    whole = figures(tmp_path)
    for format in FORMATS:
        assert job("--format", format, "--out", tmp_path / format).code == cli.DONE
        assert measure("--pictures", tmp_path / format, "--clip", clip).code == cli.DONE
        assert figures(tmp_path) == pytest.approx(whole, rel=1e-5), format
        # without what makes it a job: shards such as training reads
        (tmp_path / format / "job.json").unlink()
        assert measure("--pictures", tmp_path / format, "--clip", clip).code == cli.DONE
        assert figures(tmp_path) == pytest.approx(whole, rel=1e-5), format


@pytest.mark.parametrize("format", ["files", "parquet"])
def test_a_job_in_a_bucket(of_model, measure, job, clip, s3, tmp_path, format):  # noqa: F811
    assert of_model().code == cli.DONE
    whole = figures(tmp_path)
    assert job("--format", format, "--out", s3.url).code == cli.DONE
    assert measure("--pictures", s3.url, "--clip", clip).code == cli.DONE
    assert figures(tmp_path) == pytest.approx(whole, rel=1e-5)


def test_the_figures_do_not_depend_on_the_batch(of_model, tmp_path):
    assert of_model().code == cli.DONE
    whole = figures(tmp_path)
    assert of_model("--batch_size", 3).code == cli.DONE
    assert figures(tmp_path) == pytest.approx(whole, rel=1e-3)
    assert of_model("--seed", 8).code == cli.DONE
    assert figures(tmp_path)["clip_score"] != pytest.approx(whole["clip_score"], rel=1e-3)
    assert of_model("--num_prompts", 3).code == cli.DONE
    assert figures(tmp_path)["pictures"] == 3


def test_the_sheet_is_whole(of_model, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(judging, "sheet", lambda *args: shown.append(args) or sheets.sheet(*args))
    outcome = of_model()
    ((rows, headings),) = shown
    assert headings == {0: "Best by CLIP score", 4: "Worst by CLIP score"}
    texts = [text.split("  ") for _, text in rows]
    scores = [float(score) for score, _ in texts]
    assert scores[:4] == sorted(scores, reverse=True)[:4] and scores[4:] == sorted(scores)[:3]
    assert {text for _, text in texts} == {row["prompt"] for row in ROWS}
    sheet, file = tmp_path / "results" / "best-and-worst.png", tmp_path / "results" / "evaluation.json"
    assert outcome.paths[-2:] == ["results/evaluation.json", "results/best-and-worst.png"]
    Image.open(sheet).verify()
    assert len(set(finish.read_settings(sheet)["sheet"])) == 7
    assert sorted(path.name for path in file.parent.iterdir()) == sorted([file.name, sheet.name])


def test_a_folder_of_single_pictures(measure, draw, clip, tmp_path):
    """What launch.generate leaves beside them is no picture; of others, the captions lie beside them."""
    assert draw("a fox", "a car", "--frames", 2, "--words").code == cli.DONE
    assert measure("--pictures", tmp_path / "out", "--clip", clip).code == cli.DONE
    assert report(tmp_path)["pictures"] == 2
    whole = report(tmp_path)["clip_score"]
    plain = tmp_path / "plain"
    plain.mkdir()
    for i, path in enumerate(sorted((tmp_path / "out").glob("0*[!p].png"))):
        if not path.suffixes[:-1]:  # neither a strip nor a sheet of words
            Image.fromarray(np.asarray(Image.open(path))).save(plain / f"{i}.png")
            (plain / f"{i}.txt").write_text(finish.read_settings(path)["prompt"])
    assert measure("--pictures", plain, "--clip", clip).code == cli.DONE
    assert report(tmp_path)["clip_score"] == pytest.approx(whole, rel=1e-5)


def test_statistics_alone(measure, inception, photographs, features_once, tmp_path):
    flags = ("--inception", inception, "--reference", photographs, "--save_reference", "new/stats.npz")
    outcome = measure(*flags)
    assert (outcome.code, outcome.paths) == (cli.DONE, ["new/stats.npz"])
    kept = frechet.load(tmp_path / "new" / "stats.npz")
    taken = features_once(str(inception)).folder_moments(photographs)
    np.testing.assert_array_equal(kept.covariance, taken.covariance)
    assert kept.n == 3 and not (tmp_path / "results").exists()


def test_a_job_that_is_not_done(measure, job, clip, tmp_path):
    rows = [*ROWS[:3], {"prompt": "odd", "height": 17}]
    assert job(rows=rows).code == cli.FAILED
    manifests = tmp_path / "out" / "manifests"
    (manifests / "000000.json").unlink()
    outcome = measure("--pictures", tmp_path / "out", "--clip", clip)
    assert outcome.code == cli.DONE
    assert "warning: 1 of 3 shards of the job are not done: their pictures are left out" in outcome.told
    assert "warning: 1 pictures or rows of the job could not be drawn, and are left out" in outcome.told
    assert report(tmp_path)["pictures"] == 1 and len(report(tmp_path)["warnings"]) == 2
    shutil.rmtree(tmp_path / "out" / "shards")
    outcome = measure("--pictures", tmp_path / "out", "--clip", clip)
    assert outcome.code == cli.MISTAKE and "pictures of shard 000001 are gone" in outcome.told[-1]


def test_a_nan_is_left_out_and_told(of_model, load_once, model, monkeypatch, tmp_path):
    pipe = load_once(str(model), "float32", "shard_map")
    dispatch = pipe.dispatch

    def struck(requests, *rest):
        found = dispatch(requests, *rest)
        return found._replace(finite=found.finite.at[0].set(requests[0].prompt != "a wide car"))

    monkeypatch.setattr(pipe, "dispatch", struck)
    outcome = of_model()
    assert outcome.code == cli.DONE
    assert any("a NaN or an infinity struck 1 pictures" in line for line in outcome.told)
    assert (report(tmp_path)["pictures"], report(tmp_path)["left_out"]) == (6, 1)


def test_ctrl_c(of_model, monkeypatch, tmp_path):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(judging, "measure", lambda batches, *rest: [stop() for _ in batches])
    outcome = of_model()
    assert (outcome.code, outcome.told[-1]) == (cli.STOPPED, "stopped")
    assert list((tmp_path / "results").iterdir()) == []


# F a prompts file, C a CLIP, I an Inception, P photographs (no captions), E an empty folder
MISTAKES = {
    "for prompts alone": (
        "--cache_interval 3",
        "--cache_interval is for FID and CLIP score",
    ),
    "no instrument": ("--prompts_file F", "nothing to measure with"),
    "no pictures": ("--clip C", "no pictures to judge"),
    "no reference": ("--prompts_file F --inception I", "write --reference PATH"),
    "no network": ("--prompts_file F --clip C --reference P", "write --inception FILE"),
    "both": ("--prompts_file F --pictures P --clip C", "leave out one"),
    "drawn already": ("--pictures P --clip C --steps 3", "--steps is for drawing"),
    "to be drawn": ("--prompts_file F --clip C --kind files", "--kind is for --pictures"),
    "empty": ("--prompts_file F --clip=", "--clip is empty"),
    "num_prompts": ("--prompts_file F --clip C --num_prompts 0", "num_prompts=0: write 1 or more"),
    "no such file": ("--prompts_file none.txt --clip C", "none.txt: no such file"),
    "a row": ("--prompts_file F --clip C --width 17", "row 0 (id 0) cannot be drawn: width=17"),
    "sampler": ("--prompts_file F --clip C --sampler eulr", "did you mean euler"),
    "an interval": ("--prompts_file F --clip C --cache_interval 0", "cache_interval=0"),
    "bits": ("--prompts_file F --clip C --quantize int4", "quantize='int4'"),
    "no CLIP": ("--prompts_file F --clip E", "E is no CLIP"),
    "no Inception": ("--prompts_file F --inception none --reference P", "no weights none"),
    "no npz": ("--prompts_file F --inception I --reference none.npz", "no statistics none.npz"),
    "a wrong npz": ("--prompts_file F --inception I --reference wrong.npz", "are of 4 features, and FID"),
    "a broken npz": ("--prompts_file F --inception I --reference broken.npz", "broken.npz is broken"),
    "no folder": ("--prompts_file F --inception I --reference none", "no folder none"),
    "an empty folder": ("--prompts_file F --inception I --reference E", "E holds no pictures"),
    "npz again": (
        "--inception I --reference wrong.npz --save_reference new.npz",
        "is a file of statistics already",
    ),
    "no npz to write": ("--inception I --reference P --save_reference new", "ends in .npz"),
    "no captions": ("--pictures P --clip C", "0.png: no caption; mend these 3"),
    "captions without pictures": ("--pictures M --clip C", "gone.png: No such file"),
    "nothing there": ("--pictures E --clip C", "E: no pictures"),
    "no place": ("--pictures none --clip C", "none: no such folder"),
    "kind": ("--pictures P --clip C --kind fils", "--kind='fils' is unknown (did you mean files?)"),
    "no kind of files": ("--pictures P --clip C --kind world", "no pictures to read: leave it out"),
    "two kinds": ("--pictures M2 --clip C", "write --kind='files' or 'parquet'"),
    "one picture": ("--prompts_file F --num_prompts 1 --inception I --reference P", "2 pictures or more"),
    "unwritable": ("--prompts_file F --clip C --out F/results", "cannot be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_drawn(
    measure, load_once, model, prompts, clip, inception, photographs, monkeypatch, tmp_path, name
):
    pipe = load_once(str(model), "float32", "shard_map")
    monkeypatch.setattr(pipe, "dispatch", lambda *_: pytest.fail("drew first"))
    monkeypatch.setattr(judging, "measure", lambda *_: pytest.fail("measured first"))
    (tmp_path / "E").mkdir()
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(4), sigma=np.zeros((4, 4)))
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    (tmp_path / "M").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "M" / "here.png")
    (tmp_path / "M" / "here.txt").write_text("a fox")
    (tmp_path / "M2").mkdir()
    for suffix in (".png", ".parquet"):
        (tmp_path / "M2" / f"0{suffix}").write_bytes(b"")
    (tmp_path / "M" / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a fox"}\n')
    named = {"F": prompts(ROWS[:3]), "C": clip, "I": inception, "P": photographs}
    argv, told = MISTAKES[name]
    words = [str(named.get(word, word)).replace("F/", f"{named['F']}/") for word in argv.split()]
    draws = ["--model", model, "--steps", STEPS] if "--prompts_file" in words else []
    outcome = measure(*words, *draws)
    assert outcome.code == cli.MISTAKE
    shown = [line for line in outcome.told if "photographs:" not in line]  # the bar of a folder that is read
    assert len(shown) == 1 and told in shown[0]
    assert outcome.paths == []


def test_a_damaged_picture_is_named(measure, job, clip, tmp_path):
    assert job().code == cli.DONE
    path = next((tmp_path / "out" / "shards").glob("*/00000001-*.png"))
    path.write_bytes(path.read_bytes()[:60])
    outcome = measure("--pictures", tmp_path / "out", "--clip", clip)
    assert outcome.code == cli.MISTAKE
    assert "picture 1 of shard 000000 cannot be read" in outcome.told[-1]
    assert not list((tmp_path / "results").iterdir())
