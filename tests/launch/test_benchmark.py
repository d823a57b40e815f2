"""launch.benchmark on a tiny model, beside PyTorch's."""

import json
import subprocess
import sys

import jax
import pytest
from PIL import Image

from engine.errors import UserError
from launch import benchmark, cli


@pytest.fixture(autouse=True)
def cache_as_it_was():
    option = "jax_enable_compilation_cache"
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update(option, before)


def measured(tmp_path, capsys, *argv: str) -> tuple[list[dict], str]:
    """The rows in the file, and what was printed."""
    file = tmp_path / "found.json"
    assert benchmark.main([*argv, "--rounds", "2", "--out", str(file)]) == cli.DONE
    return json.loads(file.read_text())["rows"], capsys.readouterr().out


def test_generate_beside_diffusers(model, tmp_path, capsys):
    argv = ("generate", "--model", str(model), "--steps", "3", "--batch_sizes", "1,2", "--peer", "diffusers")
    rows, table = measured(tmp_path, capsys, *argv)
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["dB to diffusers"] > 45  # the same pictures
        assert 0 < row["compile s"] < row["first call s"]
        assert {name: len(each) for name, each in row["seconds"].items()} == dict.fromkeys(
            ("ours", "diffusers", "text", "decoder"), 2
        )
        assert row["images/s"] == pytest.approx(row["batch"] / sum(row["seconds"]["ours"]) * 2)
        assert row["MFU"] is None  # nobody knows what a CPU could do
    # of a whole batch, which has one prompt more to read where it is smaller
    assert 1 < rows[0]["TFLOP an image"] / rows[1]["TFLOP an image"] < 1.1
    assert "times diffusers" in table.splitlines()[0]


def test_a_plot_of_what_changes(model, tmp_path, capsys):
    file = tmp_path / "plot.png"
    argv = ("generate", "--model", str(model), "--steps", "2,4", "--side", "16,24", "--plot", str(file))
    rows, _ = measured(tmp_path, capsys, *argv)
    assert [(row["pixels"], row["steps"]) for row in rows] == [(16, 2), (16, 4), (24, 2), (24, 4)]
    assert rows[0]["TFLOP an image"] < rows[1]["TFLOP an image"] < rows[3]["TFLOP an image"]
    with Image.open(file) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**16)) > 10


def test_guidance_doubles_the_work(model, tmp_path, capsys):
    argv = ("generate", "--model", str(model), "--steps", "40")
    (with_it,), _ = measured(tmp_path, capsys, *argv)
    (without,), _ = measured(tmp_path, capsys, *argv, "--guidance_scale", "1")
    assert 1.8 < with_it["TFLOP an image"] / without["TFLOP an image"] < 2


def test_what_less_work_gains(model, tmp_path, capsys):
    rows, _ = measured(tmp_path, capsys, "spare", "--model", str(model), "--steps", "5")
    found = {row["what"]: row for row in rows}
    assert found["all of it"]["dB to all of it"] is None
    for name, row in found.items():
        assert row["images/s"] == pytest.approx(
            2 * row["batch"] * jax.device_count() / sum(row["seconds"][name])
        )
        assert name == "all of it" or 5 < row["dB to all of it"] < 80
    assert found["bfloat16"]["dB to all of it"] > found["no guidance"]["dB to all of it"]


def test_scale_with_the_work_of_a_device_held(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # which `scale` adds to, for the process that it is
    counts = sorted({1, jax.local_device_count()})
    argv = ("scale", "--model", str(model), "--steps", "4", "--devices", ",".join(map(str, counts)))
    rows, _ = measured(tmp_path, capsys, *argv)
    assert [row["devices"] for row in rows] == counts
    for row in rows:
        assert row["images/s"] == pytest.approx(2 * row["devices"] / sum(row["seconds"][str(row["devices"])]))
        sampler, bare = (row["seconds"][f"{row['devices']}, {what}"] for what in ("sampler", "bare calls"))
        assert row["over bare calls"].startswith(f"{(sampler[0] / bare[0] + sampler[1] / bare[1]) / 2:.2f}")


def test_load_beside_reading_and_copying(model, tmp_path, capsys):
    (row,), _ = measured(tmp_path, capsys, "load", "--model", str(model), "--dtype", "bfloat16")
    assert row["GB"] * 1e9 == sum(file.stat().st_size for file in model.rglob("*.safetensors"))
    for what in ("load", "read", "copy", "fill"):
        rate = "GB/s" if what == "load" else f"{what} GB/s"
        assert row[rate] == pytest.approx(row["GB"] * 2 / sum(row["seconds"][what]))


def test_train_beside_diffusers(model, tmp_path, capsys):
    (row,), _ = measured(tmp_path, capsys, "train", "--model", str(model), "--peer", "diffusers")
    assert row["images/s"] == pytest.approx(row["steps/s"] * row["batch"] * jax.device_count())
    assert 0 < row["loss"] < 10
    assert "diffusers images/s" in row


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["draw"], "'draw' is nothing to measure: write generate, train, spare, scale, load or compile"),
        (["generate", "--batch_sizes", "1,x"], "batch_sizes='1,x': write whole numbers from 1"),
        (["generate", "--peer", "comfy"], "peer='comfy' is unknown; write diffusers or diffusers-compiled"),
        (["generate", "--model", "no/such"], "no folder no/such"),
        (["generate", "--rounds", "0"], "rounds=0: write a number from 1"),
        (["train", "--dtype", "half"], "dtype='half' is unknown; write float32 or bfloat16"),
        (["train", "--remat", "block"], "remat='block' is unknown (did you mean blocks?)"),
        (["train", "--side", "30"], "side=30: this model makes multiples of 4"),
        (["train", "--side", "16,32"], "side='16,32': here write one number"),
        (["generate", "--steps", "2", "--plot", "x.png"], "plot: nothing changes"),
        (["spare", "--plot", "x.png"], "plot: nothing changes"),
        (["generate", "--quantize", "int8"], "quantize is for compile; spare measures what it does"),
        (["generate", "--split_params"], "split_params is for compile"),
        (["compile", "--dtype", "float32", "--steps", "5"], "steps is not for compile, which is bfloat16"),
        (["compile", "--rounds", "5"], "rounds is not for compile: leave it out"),
        (["compile", "--model", "sd15", "--remat", "blocks"], "remat='blocks' is for train: write it among"),
        (["train", "--steps", "20"], "steps is not for train: leave it out"),
        (["train", "--sampler", "euler"], "sampler is not for train: leave it out"),
        (["train", "--guidance_scale", "1"], "guidance_scale is not for train: leave it out"),
        (["train", "--parallel", "jit"], "parallel is not for train: leave it out"),
        (["load", "--batch_sizes", "4"], "batch_sizes is not for load: leave it out"),
        (["spare", "--peer", "diffusers"], "peer is not for spare: leave it out"),
        (["generate", "--devices", "1,2"], "devices is not for generate: leave it out"),
        (["generate", "--remat", "blocks"], "remat is not for generate: leave it out"),
        (["generate", "--parts", "unet"], "parts is for compile"),
        (["scale", "--devices", "0"], "devices='0': write whole numbers from 1"),
        (["generate", "--stepz", "3"], "unknown flag --stepz (did you mean --steps?)"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError) as error:
        benchmark.main(argv)
    assert message in str(error.value)


def test_compile_needs_its_compiler():
    """Neither a stub nor a folder without libtpu in it is taken for it."""
    code = (
        "import runpy, sys; sys.modules['libtpu'] = None; sys.argv[1:] = ['compile', '--model', 'sd15']\n"
        "runpy.run_module('launch.benchmark', run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == cli.MISTAKE
    assert done.stderr.strip() == "error: no compiler for TPUs on this machine: pip install libtpu"
