"""--hires: larger pictures, and what is beside them; in jobs, and its mistakes in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from engine import finish
from launch import cli
from tests.tiny import tiny_controlnet

FLAGS = ("--seed", 3, "--steps", 4, "--hires", 2)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_the_picture_is_larger_and_remembers_it(draw, run, tmp_path):
    (path,) = draw("a red fox", *FLAGS, "--hires_strength", 0.75).paths
    assert pixels(path).shape == (32, 32, 3)
    settings = finish.read_settings(path)
    known = {
        name: settings.get(name) for name in ("height", "width", "hires", "hires_strength", "hires_steps")
    }
    assert known == {"height": 16, "width": 16, "hires": 2, "hires_strength": 0.75, "hires_steps": None}
    (again,) = run("--like", path, "--out", tmp_path / "again").paths
    assert again.read_bytes() == path.read_bytes()
    (small,) = run("--like", path, "--hires", 1, "--out", tmp_path / "small").paths
    (plain,) = draw("a red fox", *FLAGS[:-2], "--out", tmp_path / "plain").paths
    np.testing.assert_array_equal(pixels(small), pixels(plain))


def test_all_that_is_beside_it_is_as_large(draw, tmp_path):
    found = draw(
        "a red fox", *FLAGS, "--frames", 3, "--animate", "--words", "--num_images", 2, "--upscale", 2
    )
    picture, strip, animation, words = found.paths[:4]
    assert [pixels(file).shape[:2] for file in (picture, animation)] == [(64, 64)] * 2
    larger = draw(
        "a red fox", *FLAGS[:-2], "--height", 32, "--width", 32, "--frames", 3, "--words", "--upscale", 2
    )
    assert [pixels(strip).shape, pixels(words).shape] == [pixels(file).shape for file in larger.paths[1:]]
    sheet = found.paths[-1]
    assert sheet.name == "sheet-3.png" and pixels(sheet).shape[1] > 64


def test_a_job_draws_the_same(job, draw, tmp_path):
    rows = [{"prompt": "a red fox", "seed": 3, "steps": 4}, {"prompt": "a wide car", "seed": 4, "width": 24}]
    assert job("--hires", 2, rows=rows).code == cli.DONE
    fox, car = sorted((tmp_path / "out").rglob("*.png"))
    (manifest,) = (tmp_path / "out" / "manifests").glob("*00.json")
    (of_fox,) = json.loads(manifest.read_text())["pictures"]
    assert (of_fox["height"], of_fox["width"]) == (32, 32)
    (single,) = draw("a red fox", *FLAGS, "--out", tmp_path / "single").paths
    assert np.abs(pixels(fox) - pixels(single)).max() <= 1
    assert pixels(car).shape == (32, 48, 3)
    refused = job("--hires", 1.5, rows=rows)
    assert refused.code == cli.MISTAKE and "another job" in refused.told[-1] and "hires" in refused.told[-1]
    none = job("--out", tmp_path / "none", rows=rows[:1])
    assert none.code == job("--out", tmp_path / "none", "--hires", 1, rows=rows[:1]).code == cli.DONE


def test_in_a_job_rows_with_a_picture_are_refused_and_those_of_controlnets_seen(job, draw, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "grey.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "edges.png"
    )
    net = tiny_controlnet(tmp_path / "net")
    rows = [
        {"prompt": "a red fox", "seed": 3, "steps": 4, "control_image": "edges.png"},
        {"prompt": "a cat", "image": "grey.png", "control_image": "edges.png"},
    ]
    flags = ("--controlnet", net)
    assert job(*flags, "--hires", 2, rows=rows).code == cli.FAILED
    (failure,) = map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
    assert failure["reason"].startswith("hires=2.0 is for pictures that are drawn from noise alone")
    (path,) = (tmp_path / "out").rglob("*.png")
    single = draw("a red fox", *FLAGS, *flags, "--control_image", tmp_path / "edges.png").paths[0]
    assert np.abs(pixels(path) - pixels(single)).max() <= 1
    again = draw("--like", single, "--hires", 1, "--out", tmp_path / "again")
    assert not any("has changed since" in line for line in again.told)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hires_strength", 0.5), "hires_strength=0.5 without a larger picture: write --hires 2, too"),
        (("--hires_steps", 5), "hires_steps=5 without a larger picture: write --hires 2, too"),
        (("--hires", 2, "--image", "a.png"), "hires=2.0 with a picture to change: leave one of them out"),
        (("--hires", 17), "hires=17.0 is out of range; write 1 to 16"),
        (("--hires", 2, "--hires_steps", 0), "hires_steps=0 is out of range; write 1 to 1000"),
        (("--hires", 2, "--hires_strength", 2), "hires_strength=2.0 is out of range; write 0 to 1"),
        (
            ("--hires", 2, "--hires_strength", 0.1),
            "hires_strength=0.1 takes none of 2 steps: write 0.5 or more",
        ),
    ],
)
def test_mistakes_are_one_line(draw, flags, message):
    outcome = draw("a red fox", *flags)
    assert outcome.code == cli.MISTAKE
    assert outcome.told[-1].startswith(f"error: {message}")
