"""Drawing with less work: --cache_interval, --merge_tokens, --quantize. Remembered, and their mistakes."""

import numpy as np
import pytest
from PIL import Image

from engine import finish
from launch import cli

SPARED = ("--cache_interval", 2, "--merge_tokens", 0.5, "--quantize", "int8")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_each_changes_the_picture_a_little_and_all_are_remembered(draw, run, tmp_path):
    common = ("a red fox", "--seed", 3, "--steps", 6)
    (whole,) = draw(*common).paths
    for flag, value in zip(SPARED[::2], SPARED[1::2], strict=True):
        (spared,) = draw(*common, flag, value).paths
        assert (pixels(spared) != pixels(whole)).any(), flag
        assert finish.read_settings(spared)[flag[2:]] == value
        assert flag[2:] not in finish.read_settings(whole)
    (spared,) = draw(*common, *SPARED).paths
    again = run("--like", spared, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == spared.read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--cache_interval", 0), "cache_interval=0 is out of range; write 1 to 1000"),
        (("--merge_tokens", 0.9), "merge_tokens=0.9 is out of range; write 0 to 0.75"),
        (
            ("--quantize", "int8", "--parallel", "jit", "--split_params"),
            "quantize='int8' with split_params: leave one of them out",
        ),
        (("--quantize", "int4"), "quantize='int4' is unknown (did you mean int8?); write int8 or fp8"),
    ],
)
def test_mistakes_are_one_line(draw, flags, message):
    result = draw("a red fox", *flags)
    assert (result.code, result.told) == (cli.MISTAKE, [f"error: {message}"])


def test_a_job_is_that_of_what_it_spares(job, draw, tmp_path):
    rows = [{"prompt": "a red fox"}]
    assert job("--format", "files", *SPARED, rows=rows).code == cli.DONE
    (path,) = (tmp_path / "out").rglob("*.png")
    (single,) = draw("a red fox", "--seed", 7, *SPARED, "--out", tmp_path / "single").paths
    # A job encodes its words in batches of another size.
    assert np.abs(pixels(path) - pixels(single)).max() <= 1
    for name, told in (("cache_interval", "2"), ("merge_tokens", "0.5"), ("quantize", "'int8'")):
        at = SPARED.index(f"--{name}")
        refused = job("--format", "files", *SPARED[:at], *SPARED[at + 2 :], rows=rows)
        assert refused.code == cli.MISTAKE
        assert "another job" in refused.told[-1] and f"{name} {told} there" in refused.told[-1]
