"""launch.generate with SDXL and a refiner: of one picture, of a job, and what is wrong is told in a line."""

import json

import numpy as np
import pytest
from PIL import Image

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
