"""launch.generate with SDXL and a refiner: of one picture, of a job, and what is wrong is told in a line."""

import json

import numpy as np
import pytest
from PIL import Image

import engine
from engine import finish
from engine.conditions import _numbers
from launch import generate
from tests.tiny import REFINER, TINY_VAE, XL, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    tiny_folder(at / "xl", **XL)
    tiny_folder(at / "refiner", seed=1, **REFINER)
    return at


def flags(models, out, refiner=True):
    given = ["--model", models / "xl", "--steps", 4, "--seed", 3, "--batch_size", 2, "--out", out]
    given += ["--refiner", models / "refiner", "--refiner_start", 0.5] if refiner else []
    return list(map(str, given))


def pictures(folder) -> dict[str, np.ndarray]:
    found = (path for path in folder.rglob("*.png") if "sheet" not in path.name)
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in found}


def test_a_refiner_changes_pictures_which_remember_it(models, tmp_path):
    assert generate.run(["a red fox", *flags(models, tmp_path / "a")]) == 0
    assert generate.run(["a red fox", *flags(models, tmp_path / "b", refiner=False)]) == 0
    ((name, ours),) = pictures(tmp_path / "a").items()
    assert np.abs(ours - pictures(tmp_path / "b")[name]).max() > 8
    again = ["--like", str(tmp_path / "a" / name), "--out", str(tmp_path / "c")]
    assert generate.run(again) == 0
    np.testing.assert_array_equal(pictures(tmp_path / "c")[name], ours)


def test_a_job_refines_as_a_single_run_does(models, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red fox\na cat\n")
    job = ["--prompts_file", str(tmp_path / "p.txt"), *flags(models, tmp_path / "job")]
    assert generate.run(job) == 0
    assert generate.run(["a red fox", "a cat", *flags(models, tmp_path / "single")]) == 0
    ours, theirs = pictures(tmp_path / "job"), pictures(tmp_path / "single")
    assert len(ours) == len(theirs) == 2
    for one, other in zip(sorted(ours), sorted(theirs), strict=True):
        assert np.abs(ours[one] - theirs[other]).max() <= 1
    told = json.loads((tmp_path / "job" / "job.json").read_text())["fingerprint"]
    assert told["refiner_start"] == 0.5 and len(told["refiner"]) == 64
    capsys.readouterr()
    without = [*job[:2], *flags(models, tmp_path / "job", refiner=False)]
    assert generate.run(without) == 2
    assert "refiner" in capsys.readouterr().err


def spoilt(models, at, **overrides):
    return tiny_folder(at / "other", seed=1, **{**REFINER, **overrides})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"vae": {"scaling_factor": 0.25}},
            "the refiner of another model: it has latents scaled by 0.25, the",
        ),
        ({"vae": TINY_VAE}, "the refiner of another model: it has latents scaled by 1.0, the model latents"),
        ({"unet": REFINER["unet"] | {"in_channels": 9}}, "no refiner: its U-Net takes 9 channels"),
    ],
)
def test_a_refiner_for_another_model_is_told(models, tmp_path, capsys, overrides, message):
    other = spoilt(models, tmp_path, **overrides)
    given = ["a cat", *flags(models, tmp_path / "out", refiner=False), "--refiner", str(other)]
    assert generate.run(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_wrong_flags_are_told(models, tmp_path, capsys):
    for more, message in (
        (["--refiner", str(tmp_path / "none")], "no folder"),
        (["--refiner_start", "0.5"], "without one: write --refiner FOLDER"),
        (["--refiner", str(models / "refiner"), "--refiner_start", "1.5"], "above 0 and below 1"),
        (["--refiner", str(models / "refiner"), "--refiner_start", "0.01"], "none of 4 steps to the model"),
    ):
        assert generate.run(["a cat", *flags(models, tmp_path / "out", refiner=False), *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not pictures(tmp_path)


# ---- what both are told of sizes


@pytest.mark.parametrize(
    ("told", "cond", "uncond"),
    [
        ({}, [16, 24, 0, 0, 16, 24], [16, 24, 0, 0, 16, 24]),
        (
            {"original_size": "64x32", "crop_from": "5,3"},
            [32, 64, 3, 5, 16, 24],
            [32, 64, 3, 5, 16, 24],
        ),
        (
            {"target_size": "8x9", "negative_size": "1x2"},
            [16, 24, 0, 0, 9, 8],
            [2, 1, 0, 0, 9, 8],
        ),
    ],
)
def test_sizes_that_are_told(models, told, cond, uncond):
    pipe = engine.load(models / "xl")
    settings = pipe.settings(2, height=16, width=24, **told)
    for numbers, expected in zip(_numbers(pipe.model, 2, settings), (cond, uncond), strict=True):
        np.testing.assert_array_equal(numbers, [expected] * 2)
    refiner = engine.load(models / "refiner")
    for numbers, expected, score in zip(
        _numbers(refiner.model, 1, settings), (cond, uncond), (6, 2.5), strict=True
    ):
        np.testing.assert_array_equal(numbers, [[*expected[:4], score]])


def test_they_change_pictures_which_remember_them(models, tmp_path):
    told = ["--original_size", "64x32", "--crop_from", "5,3"]
    assert generate.run(["a red fox", *flags(models, tmp_path / "a"), *told]) == 0
    assert generate.run(["a red fox", *flags(models, tmp_path / "b")]) == 0
    ((name, ours),) = pictures(tmp_path / "a").items()
    assert np.abs(ours - pictures(tmp_path / "b")[name]).max() > 8
    settings = finish.read_settings(tmp_path / "a" / name)
    assert (settings["original_size"], settings["crop_from"]) == ("64x32", "5,3")
    assert generate.run(["--like", str(tmp_path / "a" / name), "--out", str(tmp_path / "c")]) == 0
    np.testing.assert_array_equal(pictures(tmp_path / "c")[name], ours)
    unsaid = ["--original_size", "", "--crop_from", "", "--out", str(tmp_path / "d")]
    assert generate.run(["--like", str(tmp_path / "a" / name), *unsaid]) == 0
    np.testing.assert_array_equal(pictures(tmp_path / "d")[name], pictures(tmp_path / "b")[name])


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("xl", ["--original_size", "64"], "original_size='64': write WIDTHxHEIGHT, such as 1024x768"),
        ("xl", ["--target_size", "0x64"], "target_size='0x64': write WIDTHxHEIGHT, such as 1024x768"),
        ("xl", ["--crop_from", "3x5"], "crop_from='3x5': write LEFT,TOP in pixels, such as 0,128"),
        ("xl", ["--original_size", "9" * 5000 + "x64"], "original_size='99"),
        ("xl", ["--original_size", "64x99999"], "original_size='64x99999': write WIDTHxHEIGHT"),
        (
            "refiner",
            ["--target_size", "64x64"],
            "target_size=64x64: SDXL's refiner is told none",
        ),
        ("plain", ["--crop_from", "0,0"], "crop_from=0,0: this model is told nothing of sizes, as SDXL is"),
    ],
)
def test_sizes_that_cannot_be_told(models, tmp_path, capsys, model, flags, message):
    if model == "plain":
        tiny_folder(models / "plain")
    assert generate.run(["a red fox", "--model", str(models / model), "--out", str(tmp_path), *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
