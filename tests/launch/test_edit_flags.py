"""--image, --mask, --strength: other pictures, remembered in them; their mistakes in one line."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from engine import finish
from launch import cli

ROOT = pathlib.Path(__file__).parents[2]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def save(path, array):
    Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    squares = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return save(tmp_path_factory.mktemp("given") / "squares.png", squares.repeat(4, 0).repeat(4, 1))


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    array = np.zeros((16, 16), np.uint8)
    array[:8] = 255
    return save(tmp_path_factory.mktemp("given") / "mask.png", array)


def test_a_masked_picture_remembers_what_it_was_made_of(draw, run, image, mask, tmp_path):
    (path,) = draw("a red fox", "--seed", 3, "--image", image, "--mask", mask).paths
    np.testing.assert_array_equal(pixels(path)[8:], pixels(image)[8:])
    settings = finish.read_settings(path)
    assert (settings["image"], settings["mask"], settings["strength"]) == (str(image), str(mask), 1.0)
    again = run("--like", path, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == path.read_bytes()
    free = run("--like", path, "--image=", "--out", tmp_path / "free")
    assert free.code == cli.MISTAKE and "without a picture: write --image FILE, too" in free.told[-1]


@pytest.mark.parametrize("changed", ["image", "mask"])
def test_pictures_of_other_contents_under_the_same_name(draw, run, image, mask, tmp_path, changed):
    """A mask is painted again, and the command run again: what was drawn before stays."""
    files = {"image": tmp_path / "image.png", "mask": tmp_path / "mask.png"}
    for name, file in (("image", image), ("mask", mask)):
        files[name].write_bytes(file.read_bytes())
    flags = "a red fox", "--seed", 3, "--image", files["image"], "--mask", files["mask"]
    (first,) = draw(*flags).paths
    assert draw(*flags).paths == [first]
    save(files[changed], 255 - np.asarray(Image.open(files[changed])))
    told = run("--like", first, "--out", tmp_path / "again").told
    what = {"image": "picture"}.get(changed, changed)
    assert f"warning: {first} was drawn with another {what}: {files[changed]} has changed since" in told
    before = first.read_bytes()
    assert [path.name for path in draw(*flags).paths] == ["00000-a-red-fox-2.png"]
    assert first.read_bytes() == before


def test_pictures_of_words_do_not_say_so(draw):
    settings = finish.read_settings(draw("a red fox", "--seed", 3).paths[0])
    assert not {"image", "mask", "strength", "image_guidance_scale"} & settings.keys()


def test_a_picture_without_a_mask_is_drawn_over(draw, image):
    weak, strong = (
        pixels(draw("a fox", "--seed", 3, "--image", image, "--strength", s).paths[0]) for s in (0.5, 1)
    )
    assert np.abs(weak.astype(int) - strong).mean() > 3
    usual = draw("a fox", "--seed", 3, "--image", image, "--frames", 2)
    assert finish.read_settings(usual.paths[0])["strength"] == 0.8


@pytest.mark.parametrize(
    "shape, flags, drawn",
    [
        ((90, 200), [], (16, 16)),  # the tiny model knows 16 px and no smaller step
        ((90, 200), ["--height", 16], (16, 32)),
        ((90, 200), ["--width", 32], (16, 32)),
        ((16, 16), ["--width", 32, "--height", 16], (16, 32)),
    ],
)
def test_sizes(draw, tmp_path, shape, flags, drawn):
    file = save(tmp_path / "wide.png", np.full((*shape, 3), 99, np.uint8))
    (path,) = draw("a fox", "--image", file, *flags).paths
    assert pixels(path).shape == (*drawn, 3)


def test_a_picture_that_is_too_large_is_one_line(model, tmp_path):
    """Without Pillow's own warning, and without its code."""
    large = tmp_path / "large.png"
    Image.new("1", (12000, 8000)).save(large)
    command = [sys.executable, "-m", "launch.generate", "a fox", "--model", model, "--image", large]
    command += ["--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == cli.MISTAKE
    assert done.stderr == f"error: {large}: 12000 x 8000 pixels: too large; write a PNG, JPEG or WebP\n"


def test_mistakes_are_one_line(run, image, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    small = save(tmp_path / "small.png", np.zeros((8, 16), np.uint8))
    for flags, message in (
        (["--image", tmp_path / "none.png"], "none.png: No such file or directory; write the file of a pict"),
        (["--image", tmp_path], "Is a directory; write the file of a picture"),
        (["--image", text], "text.png: damaged, or none of PNG, JPEG, WEBP; write a PNG, JPEG or WebP"),
        (["--image", image, "--mask", small], "small.png has 16 x 8 pixels, and the picture"),
        (["--mask", image], "without a picture: write --image FILE, too"),
        (["--strength", 0.5], "strength=0.5 without a picture: write --image FILE, too"),
        (
            ["--image_guidance_scale", 2],
            "image_guidance_scale=2.0 without a picture: write --image FILE, too",
        ),
        (["--image", image, "--strength", 2], "strength=2.0: write a number above 0 and up to 1"),
        (["--image", image, "--strength", 0.01], "takes none of 4 steps: write 0.25 or more"),
        (
            ["--image", image, "--strength", 0.033, "--steps", 30],
            "of 30 steps: write 0.034 or more",
        ),
    ):
        told = run("a fox", "--steps", 4, "--out", tmp_path / "out", *flags)
        assert told.code == cli.MISTAKE, flags
        assert message in told.told[-1], told.told
        assert not (tmp_path / "out").exists()
