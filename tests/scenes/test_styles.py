"""The same scene, drawn in other ways."""

import json

import numpy as np
import pytest
from PIL import Image

from engine import scenes
from launch import cli
from launch import scenes as command

IMAGES = scenes.batch(0, 0, 8)[0]


@pytest.mark.parametrize("size", [16, 64, 100])
@pytest.mark.parametrize("style", scenes.STYLES)
def test_a_style_keeps_the_size_and_is_the_same_again(style, size):
    image = np.asarray(Image.fromarray(IMAGES[0]).resize((size, size)))
    drawn = scenes.restyle(image, style)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, scenes.restyle(image, style))


def colours(images):
    """How far the pixels are from grey, on average."""
    return float(np.mean(images.max(-1).astype(int) - images.min(-1)))


def test_styles_look_as_they_are_called():
    drawn = {style: np.stack([scenes.restyle(image, style) for image in IMAGES]) for style in scenes.STYLES}
    assert colours(drawn["pencil sketch"]) < 0.3 * colours(IMAGES) and drawn["pencil sketch"].mean() > 180
    assert np.median(drawn["neon"].max(-1)) < 30 and drawn["neon"].max() == 255
    squares = drawn["pixel art"].reshape(8, 16, 4, 16, 4, 3)
    assert (squares == squares[:, :, :1, :, :1]).all()
    assert drawn["watercolour"].mean() > IMAGES.mean() + 20
    assert np.abs(np.diff(drawn["watercolour"].astype(int), axis=1)).mean() < (
        np.abs(np.diff(IMAGES.astype(int), axis=1)).mean()
    )


def test_a_folder_of_pictures_with_captions(tmp_path, capsys):
    out = tmp_path / "sketches"
    argv = ["--num_images", "3", "--style", "pencil sketch", "--out", str(out), "--size", "32"]
    assert cli.exit_code(command.main, argv) == cli.DONE
    assert capsys.readouterr().out.strip() == str(out)
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for index, line in enumerate(lines):
        image, caption, _ = scenes.example(0, index, 32)
        assert line["text"] == f"{caption}, pencil sketch"
        with Image.open(out / line["file_name"]) as drawn:
            np.testing.assert_array_equal(np.asarray(drawn), scenes.restyle(image, "pencil sketch"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--style", "pencil skech", "--out", "D"], "did you mean pencil sketch?"),
        (["--num_images", "0", "--out", "D"], "num_images=0 is out of range; write 1 to"),
        ([], "write --out"),
        (["x", "--out", "D"], "'x' is no flag"),
    ],
)
def test_mistakes_are_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.exit_code(command.main, argv) == cli.MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []
