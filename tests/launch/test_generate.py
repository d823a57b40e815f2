"""From the command line to pictures: names, settings inside, the same picture again, strips, progress."""

import inspect
import io
import pathlib
import re
import subprocess
import sys
import typing

import numpy as np
import pytest
from PIL import Image

import engine
from engine import finish
from engine.config import FORMATS, GenerateConfig, JobConfig
from engine.diffusion.samplers import SAMPLERS
from engine.diffusion.scheduler_config import GRIDS
from engine.jobs import digests, pictures
from engine.loading import DTYPES
from engine.parallel import MODES
from engine.pipeline import Pipeline
from launch import cli, drawing, generate
from launch.progress import Progress

ROOT = pathlib.Path(__file__).parents[2]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# help


def test_help_names_every_flag_with_its_default(run, capsys):
    assert generate.run(["--help"]) == 0
    text = capsys.readouterr().out
    shown = dict(re.findall(r"^  --(\w+)((?:.|\n {10})*)", text, re.M))
    options = typing.get_type_hints(JobConfig).keys() - {"prompts"}
    assert shown.keys() == options | {"like", "status", "verify", "merge"}
    for name in options:
        default = getattr(JobConfig, name)
        said = re.search(r"\(default (.*)\)", shown[name])
        assert (said and said[1]) == (None if default in (None, "", False) else str(default)), name
    for choices, flag in (
        (SAMPLERS, "sampler"),
        (GRIDS, "grid"),
        (MODES, "parallel"),
        (DTYPES, "dtype"),
        (FORMATS, "format"),
    ):
        assert [word for word in re.findall(r"\w+", shown[flag]) if word in choices][: len(choices)] == [
            *choices
        ]
    assert [line for line in text.splitlines() if len(line) > 120] == []


def test_help_and_mistakes_in_flags_do_without_jax():
    code = """
import sys
from launch import generate
assert [generate.run(argv) for argv in (["-h"], ["--stpes", "3", "x"], [])] == [0, 2, 2]
assert not {"jax", "numpy", "PIL"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_defaults_are_those_of_the_python_api():
    generate_ = inspect.signature(Pipeline.generate).parameters
    for name in ("steps", "sampler", "guidance_scale", "height", "width", "first_index", "batch_size"):
        assert generate_[name].default == getattr(GenerateConfig, name), name


# pictures and their settings


def test_pictures_are_those_of_the_python_api(draw, load_once, model, tmp_path):
    done = draw("a red fox", "two trees", "--num_images", 2, "--seed", 7, "--negative_prompt", "night")
    prompts = ["a red fox", "a red fox", "two trees", "two trees"]
    stems = ["00000-a-red-fox", "00001-a-red-fox", "00002-two-trees", "00003-two-trees"]
    assert done.code == 0
    assert done.paths == [tmp_path / "out" / f"{stem}.png" for stem in (*stems, "sheet-7")]
    wanted = load_once(str(model), "float32", "shard_map").generate(
        prompts, "night", seed=7, steps=2, batch_size=2
    )
    np.testing.assert_array_equal(np.stack([pixels(path) for path in done.paths[:4]]), wanted)
    for index, path in enumerate(done.paths[:4]):
        assert finish.read_settings(path) == {
            "contents": {"weights": digests.of_weights(model)},
            "prompt": prompts[index],
            "negative_prompt": "night",
            "seed": 7,
            "index": index,
            "sampler": "dpmpp_2m",
            "steps": 2,
            "guidance_scale": 5.0,
            "height": 16,
            "width": 16,
            "model": str(model),
            "dtype": "float32",
            "parallel": "shard_map",
            "batch_size": 2,
            "upscale": 1,
            "version": engine.__version__,
        }


def test_every_option_reaches_the_picture(draw, load_once, model):
    options = {"sampler": "euler_ancestral", "steps": 3, "guidance_scale": 1, "height": 24, "width": 8}
    flags = [f"--{name}={value}" for name, value in options.items()]
    done = draw("a red fox", "--seed=1", "--first_index=5", "--parallel=pmap", "--dtype=bfloat16", *flags)
    pipe = load_once(str(model), "bfloat16", "pmap")
    (wanted,) = pipe.generate(["a red fox"], seed=1, first_index=5, batch_size=2, **options)
    assert done.paths[0].name == "00005-a-red-fox.png"
    np.testing.assert_array_equal(pixels(done.paths[0]), wanted)
    options |= {"index": 5, "parallel": "pmap", "dtype": "bfloat16"}
    assert options.items() <= finish.read_settings(done.paths[0]).items()


def test_without_a_seed_a_fresh_one_is_told_and_draws_the_same_again(draw):
    first, second = draw("a red fox"), draw("a red fox")
    seeds = [re.fullmatch(r"seed (\d+)", done.told[0])[1] for done in (first, second)]
    assert seeds[0] != seeds[1]
    assert second.paths[0].name == "00000-a-red-fox-2.png"
    assert (pixels(first.paths[0]) != pixels(second.paths[0])).any()
    again = draw("a red fox", "--seed", seeds[1])
    assert again.paths == second.paths
    assert not any("seed" in line for line in again.told)


def test_the_last_index_of_a_seed_is_drawn(draw, run, tmp_path):
    """And can be drawn again: to the bit in batches of as many rows. One more would have no index."""
    last = 2**32 - 1
    done = draw("a cat", "a dog", "--seed=7", f"--first_index={last - 1}", "--batch_size=1")
    assert [finish.read_settings(path)["index"] for path in done.paths[:2]] == [last - 1, last]
    again = run("--like", done.paths[1], "--out", tmp_path / "again")
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(done.paths[1]))


def test_upscale(draw):
    small, large = draw("a fox", "--seed", 3), draw("a fox", "--seed", 3, "--upscale", 4)
    np.testing.assert_array_equal(pixels(large.paths[0]), finish.upscale(pixels(small.paths[0]), 4))
    assert draw("--like", large.paths[0]).paths == large.paths


def test_flags_may_stand_anywhere_and_double_dash_ends_them(draw):
    done = draw("--seed=3", "--", "--steps", "-5")
    assert [path.name for path in done.paths] == ["00000-steps.png", "00001-5.png", "sheet-3.png"]


def test_unquoted_words_are_noticed(draw):
    assert any("in quotes" in line for line in draw("red", "fox", "--seed=3").told)
    assert not any("in quotes" in line for line in draw("a fox", "cat", "--seed=3").told)


@pytest.mark.parametrize(("count", "side", "batch"), [(1, 16, 1), (3, 16, 3), (99, 16, 16), (99, 1024, 2)])
def test_without_a_batch_size(load_once, model, tmp_path, count, side, batch):
    pipe = load_once(str(model), "float32", "shard_map")
    config = GenerateConfig(("x",), num_images=count, height=side, width=side, out=str(tmp_path))
    assert pictures.plan(config, pipe).settings.batch_size == batch


# the same picture again


def test_like_makes_exactly_that_picture(draw, run, tmp_path):
    sampler = ("--sampler", "ddpm", "--guidance_scale", 3, "--negative_prompt", "night")
    done = draw("a red fox", "two trees", "a blue car", "--seed", 2**64 - 1, *sampler)
    before = names(tmp_path / "out")
    for path in done.paths[:3]:
        data = path.read_bytes()
        other = run("--like", path, "--out", tmp_path / "other")
        assert (other.code, other.paths[0].name, other.paths[0].read_bytes()) == (0, path.name, data)
        same = run("--like", path, "--out", tmp_path / "out")
        assert (same.paths, same.paths[0].read_bytes()) == ([path], data)
    assert names(tmp_path / "out") == before


def test_flags_override_what_a_picture_says(draw, run, tmp_path):
    (path,) = draw("a red fox", "--seed", 4).paths
    done = run("--like", path, "--guidance_scale", 3, "--out", tmp_path / "out")
    assert done.paths == [tmp_path / "out" / "00000-a-red-fox-2.png"]
    assert finish.read_settings(done.paths[0]) == finish.read_settings(path) | {"guidance_scale": 3.0}
    done = run("--like", path, "a blue car", "--num_images", 2, "--out", tmp_path / "cars")
    assert names(tmp_path / "cars") == ["00000-a-blue-car.png", "00001-a-blue-car.png", "sheet-4.png"]


def test_like_tells_of_another_version(draw, run, tmp_path, monkeypatch):
    (path,) = draw("a red fox", "--seed", 4).paths
    monkeypatch.setattr(engine, "__version__", "9.9.9")
    done = run("--like", path, "--out", tmp_path / "out")
    assert re.search(r"was drawn by fogsculpt 0\.\S+; this is 9\.9\.9", done.told[0])
    assert done.paths[0].name == "00000-a-red-fox-2.png"  # it may look another way: the old one stays


def test_a_file_of_someone_else_is_never_replaced(draw, tmp_path):
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / "00000-a-fox.png"
    theirs.write_text("precious")
    assert draw("a fox", "--seed", 1).paths[0].name == "00000-a-fox-2.png"
    assert theirs.read_text() == "precious"


def test_files_of_someone_else_beside_a_picture_are_never_replaced(draw, tmp_path):
    (tmp_path / "out").mkdir()
    ends = ("-2.strip.png", "-3.words.png", "-4.webp")
    for theirs in (files := [tmp_path / "out" / f"00000-a-fox{end}" for end in ends]):
        theirs.write_text("precious")
    flags = ("--seed", 1, "--frames", 2, "--animate", "--words")
    assert draw("a fox", *flags).paths[0].name == "00000-a-fox.png"
    first = draw("a fox", *flags).paths
    assert first[0].name == "00000-a-fox.png", "the same run twice leaves one set"
    strip = first[1].read_bytes()
    other = draw("a fox", "--seed", 1, "--frames", 3, "--animate", "--words").paths
    assert {path.name.partition(".")[0] for path in other} == {"00000-a-fox-5"}
    assert first[1].read_bytes() == strip
    assert all(theirs.read_text() == "precious" for theirs in files)


# several at a glance


def test_a_long_run_keeps_no_more_pictures_than_its_sheet_shows(draw, monkeypatch):
    monkeypatch.setattr(drawing, "SHEET_IMAGES", 2)
    done = draw("a red fox", "--num_images", 5, "--seed", 7)
    assert len(done.paths) == 6
    assert finish.read_settings(done.paths[-1])["sheet"] == ["00000-a-red-fox.png", "00001-a-red-fox.png"]
    assert done.told[-1] == "sheet-7.png shows the first 2 pictures"


def test_sheet_shows_all_pictures_of_the_run(draw):
    done = draw("a red fox", "two trees", "a cat", "--seed", 7)
    sheet = pixels(done.paths[-1])
    for i, path in enumerate(done.paths[:3]):
        top, left = 4 + i // 2 * 36, 4 + i % 2 * 20  # 16 px, 16 for a label, gaps of 4
        np.testing.assert_array_equal(sheet[top : top + 16, left : left + 16], pixels(path))


def test_strip_and_animation_go_from_static_to_picture(draw, tmp_path):
    plain = draw("a red fox", "--seed", 7)
    done = draw("a red fox", "--seed", 7, "--frames", 3, "--animate")
    stem = tmp_path / "out" / "00000-a-red-fox"
    assert done.paths == [stem.with_suffix(end) for end in (".png", ".strip.png", ".webp")]
    assert plain.paths[0] == done.paths[0]
    strip, picture = pixels(done.paths[1]), pixels(done.paths[0])
    assert strip.shape == (2 * 20 + 4, 3 * 20 + 4, 3)
    cells = [[strip[y : y + 16, x : x + 16] for x in (4, 24, 44)] for y in (4, 24)]
    noisy, denoised = ([np.abs(cell.astype(int) - picture).mean() for cell in row] for row in cells)
    assert noisy[0] > noisy[1] > noisy[2] == 0
    assert noisy[0] > denoised[0] > denoised[1] == denoised[2] == 0  # the last step ends at its D
    with Image.open(done.paths[2]) as animation:
        assert (animation.n_frames, animation.size) == (3, (16, 16))


def test_a_sheet_shows_which_word_steered_what(draw, run, tmp_path):
    """Beside the same picture as without; and it can be made again from the sheet."""
    done = draw("a red fox", "--seed", 7, "--words")
    stem = tmp_path / "out" / "00000-a-red-fox"
    assert done.paths == [stem.with_suffix(end) for end in (".png", ".words.png")]
    sheet, picture = pixels(done.paths[1]), pixels(done.paths[0])
    assert sheet.shape == (2 * 36 + 4, 2 * 20 + 4, 3)  # the picture and three words, each with a line below
    np.testing.assert_array_equal(sheet[4:20, 4:20], picture)
    again = run("--like", done.paths[1], "--out", tmp_path / "again")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in done.paths]
    np.testing.assert_array_equal(pixels(draw("a red fox", "--seed", 7).paths[0]), picture)


def test_like_a_strip_makes_the_strip_again(draw, run, tmp_path):
    done = draw("a red fox", "--seed", 7, "--frames", 2)
    again = run("--like", done.paths[1], "--out", tmp_path / "again")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in done.paths]


def test_an_animation_alone_shows_every_step(draw, tmp_path):
    done = draw("a red fox", "--seed", 7, "--animate")
    assert [path.suffix for path in done.paths] == [".png", ".webp"]
    with Image.open(done.paths[1]) as animation:
        assert animation.n_frames == 3


# what is said on the way


def test_what_the_model_will_not_read_is_said_once(draw):
    done = draw(
        "a zebra", "a red zebra", "red " * 40, "--num_images", 2, "--negative_prompt", "ugly", "--seed", 1
    )
    warnings = [line for line in done.told if line.startswith("warning")]
    assert len(warnings) == 2
    assert "cut at |" in warnings[0]
    assert "zebra, ugly" in warnings[1]


def test_a_line_a_batch_where_nobody_watches(draw):
    told = draw("a red fox", "--num_images", 5, "--seed", 1).told
    assert [line.split(",")[0] for line in told] == [
        "batch 1/3: 2/5 images",
        "batch 2/3: 4/5 images",
        "batch 3/3: 5/5 images",
    ]
    assert all(re.search(r", [\d.e+]+ images/s", line) for line in told)
    assert ["left" in line for line in told] == [True, True, False]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_where_somebody_watches(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    with Progress([2, 2, 1], steps=[6, 6, 9]) as progress:
        for _ in range(7):
            progress.step(3)
        cli.tell("warning: above the bar")
    drawn = terminal.getvalue()
    assert "100%" in drawn and "batch 3/3, step 9/9" in drawn and "images/s" in drawn and "left" in drawn
    assert "Warning" not in drawn  # tqdm's own, of rounding beyond 100 %
    assert "batch 1/3:" not in drawn
    assert re.search(r"\r\s*\rwarning: above the bar\n", drawn)
