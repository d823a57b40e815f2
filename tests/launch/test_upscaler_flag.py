"""--upscaler: larger pictures, which remember it; with --upscale, in jobs, and its mistakes in one line."""

import jax
import numpy as np
import pytest
from PIL import Image

from engine import finish
from engine.enlarging import Enlarging
from launch import cli
from tests.upscalers import tiny_upscaler


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return tiny_upscaler(tmp_path_factory.mktemp("upscaler") / "net.safetensors")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_the_picture_is_larger_and_remembers_it(draw, run, net, tmp_path):
    (path,) = draw("a red fox", "--seed", 3, "--upscaler", net).paths
    assert pixels(path).shape == (64, 64, 3)
    settings = finish.read_settings(path)
    assert (settings["upscaler"], settings["upscale"], settings["height"]) == (str(net), 1, 16)
    (again,) = run("--like", path, "--out", tmp_path / "again").paths
    assert again.read_bytes() == path.read_bytes()
    (small,) = run("--like", path, "--upscaler", "", "--out", tmp_path / "small").paths
    assert pixels(small).shape == (16, 16, 3)


@pytest.mark.parametrize("factor", [2, 4, 6])
def test_upscale_is_the_factor_in_the_end(draw, net, factor):
    (path,) = draw("a red fox", "--seed", 3, "--upscaler", net, "--upscale", factor).paths
    whole = draw("a red fox", "--seed", 3, "--upscaler", net).paths[-1]
    assert pixels(path).shape == (16 * factor, 16 * factor, 3)
    expected = Image.open(whole).resize((16 * factor,) * 2, Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(pixels(path), np.asarray(expected))


def test_strips_animations_and_words_are_as_large_as_without_it(draw, net):
    flags = ("--seed", 3, "--frames", 2, "--words", "--steps", 3)
    plain = draw("a red fox", *flags).paths
    larger = draw("a red fox", *flags, "--upscaler", net).paths
    sizes = [[Image.open(path).size for path in paths] for paths in (plain, larger)]
    assert sizes[0][0] == (16, 16) and sizes[1][0] == (64, 64) and sizes[0][1:] == sizes[1][1:]


def test_words_are_lit_in_the_picture_as_it_was_drawn(draw, tmp_path):
    flags = ("--seed", 3, "--words", "--steps", 3)
    sheets = [
        draw("a red fox", *flags, "--upscale", factor, "--out", tmp_path / str(factor)).paths[1]
        for factor in (1, 3)
    ]
    np.testing.assert_array_equal(pixels(sheets[0]), pixels(sheets[1]))


def test_contact_sheets_are_of_pictures_as_they_were_drawn(draw, net):
    """Enlarged, hundreds of them would be gigabytes."""
    plain = draw("a red fox", "a cat", "--seed", 3).paths[-1]
    larger = draw("a red fox", "a cat", "--seed", 3, "--upscaler", net).paths[-1]
    assert plain.name.startswith("sheet-") and Image.open(plain).size == Image.open(larger).size


def test_where_memory_runs_out_tiles_are_what_helps(draw, job, net, monkeypatch):
    """Of any batch, pictures are enlarged one after another."""

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(Enlarging, "__call__", full)
    assert (
        draw("a red fox", "--upscaler", net)
        .told[-1]
        .startswith("error: out of memory; write --tile 512, or ")
    )
    assert "write --tile 512 or a smaller size" in job("--upscaler", net, rows=[{"prompt": "a cat"}]).told[-1]


def test_a_job_is_that_of_its_upscaler(job, draw, net, tmp_path):
    rows = [{"prompt": "a red fox"}]
    assert job("--upscaler", net, rows=rows).code == cli.DONE
    (path,) = (tmp_path / "out").rglob("*.png")
    (single,) = draw("a red fox", "--seed", 7, "--upscaler", net, "--out", tmp_path / "single").paths
    assert pixels(path).shape == (64, 64, 3)
    assert np.abs(pixels(path) - pixels(single)).mean() < 2  # words in batches of another size, much enlarged
    refused = job(rows=rows)
    assert (
        refused.code == cli.MISTAKE and "another job" in refused.told[-1] and "upscaler" in refused.told[-1]
    )


def test_one_that_has_changed_since_is_told_of(draw, run, net, tmp_path):
    own = tiny_upscaler(tmp_path / "own.safetensors")
    (path,) = draw("a red fox", "--seed", 3, "--upscaler", own).paths
    tiny_upscaler(own, seed=1)
    told = run("--like", path, "--out", tmp_path / "again").told
    assert any("was drawn with another upscaler: " in line and "has changed since" in line for line in told)
    own.unlink()
    assert run("--like", path).told == [
        f"error: {path} was drawn with the upscaler {own}, which is not here; write --upscaler FILE"
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.safetensors", "error: no upscaler none.safetensors: write the path of a .safetensors file"),
        ("net.pth", "error: net.pth is in a format that is never opened because it can run code"),
    ],
)
def test_a_wrong_file_is_one_line(draw, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    if name.endswith("pth"):
        (tmp_path / name).write_bytes(b"code")
    done = draw("a red fox", "--upscaler", name)
    assert done.code == cli.MISTAKE and len(done.told) == 1 and done.told[0].startswith(message)
