"""--clip_skip: words of a less deep encoder, remembered in pictures and in jobs; its mistakes in one line."""

import numpy as np
import pytest
from PIL import Image

from engine import finish
from launch import cli
from tests.tiny import XL, tiny_folder


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_it_changes_the_picture_which_remembers_it(draw, run, tmp_path):
    (whole,) = draw("a red fox", "--seed", 3).paths
    (less,) = draw("a red fox", "--seed", 3, "--clip_skip", 1).paths
    assert np.abs(pixels(less) - pixels(whole)).mean() > 1
    assert finish.read_settings(less)["clip_skip"] == 1 and "clip_skip" not in finish.read_settings(whole)
    again = run("--like", less, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == less.read_bytes()


def test_a_job_is_that_of_its_depth(job, draw, tmp_path):
    rows = [{"prompt": "a red fox"}]
    assert job("--format", "files", "--clip_skip", 1, rows=rows).code == cli.DONE
    (path,) = (tmp_path / "out").rglob("*.png")
    (single,) = draw("a red fox", "--seed", 7, "--clip_skip", 1, "--out", tmp_path / "single").paths
    # A job encodes its words in batches of another size.
    assert np.abs(pixels(path) - pixels(single)).max() <= 1
    refused = job("--format", "files", rows=rows)
    assert refused.code == cli.MISTAKE
    assert "another job" in refused.told[-1] and "clip_skip 1 there" in refused.told[-1]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (2, "clip_skip=2: of this model's text encoder write 0 to 1"),
        (-1, "clip_skip=-1 is out of range; write 0 to 99"),
    ],
)
def test_a_wrong_depth_is_one_line(draw, layers, message):
    done = draw("a red fox", "--clip_skip", layers)
    assert (done.code, done.told) == (cli.MISTAKE, [f"error: {message}"])


def test_of_sdxl_a_layer_more_is_its_own(draw, tmp_path):
    """It reads the states before the last layer as it is: one layer is enough, and has none to leave out."""
    least = {"num_hidden_layers": 1}
    model = tiny_folder(tmp_path / "model", **{**XL, "text_encoder": least, "text_encoder_2": least})
    assert draw("a red fox", "--model", model).code == cli.DONE
    done = draw("a red fox", "--model", model, "--clip_skip", 1)
    assert done.told == ["error: clip_skip=1: of this model's text encoder write 0 to 0"]
