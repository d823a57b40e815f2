"""--lora: other pictures, remembered in them and in jobs; its mistakes in one line."""

import jax
import numpy as np
import pytest
from PIL import Image

from engine import finish
from engine.config import GenerateConfig
from engine.types import UserError
from engine.weights import lora, lora_files
from engine.weights.folder import load_folder
from launch import cli
from tests.tiny import tiny_model


def write(path, configs, seed=0):
    fresh = lora.fresh(jax.random.key(0), configs, ["to_q", "to_v", "conv1", "q_proj"], 2, 2.0)
    rng = np.random.default_rng(seed)
    layers = jax.tree.map(lambda array: rng.standard_normal(array.shape, np.float32), fresh.layers)
    return lora_files.save(path, lora.Lora(layers, fresh.alphas))


@pytest.fixture(scope="module")
def configs(model):
    loaded = load_folder(model)
    return {kind: getattr(loaded, kind).config for kind in lora.KINDS}


@pytest.fixture(scope="module")
def file(configs, tmp_path_factory):
    return write(tmp_path_factory.mktemp("loras") / "fox.safetensors", configs)


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_lora_changes_the_picture_which_remembers_it(draw, run, file, tmp_path):
    (without,) = draw("a red fox", "--seed", 3).paths
    (with_it,) = draw("a red fox", "--seed", 3, "--lora", f"{file}=0.5").paths
    assert np.abs(pixels(without).astype(int) - pixels(with_it)).mean() > 5
    assert finish.read_settings(with_it)["lora"] == f"{file}=0.5"
    assert "lora" not in finish.read_settings(without)
    again = run("--like", with_it, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == with_it.read_bytes()
    plain = run("--like", with_it, "--lora=", "--out", tmp_path / "plain")
    assert plain.paths[0].read_bytes() == without.read_bytes()


def test_scale_0_is_nothing_and_halves_add_up(draw, file):
    paths = [
        draw("a red fox", "--seed", 3, "--lora", value).paths[0]
        for value in (f"{file}=0", f"{file}=0.25,{file}=0.25", f"{file}=0.5")
    ]
    nothing, halves, whole = map(pixels, paths)
    np.testing.assert_array_equal(nothing, pixels(draw("a red fox", "--seed", 3).paths[0]))
    assert np.abs(halves.astype(int) - whole).max() <= 1


def test_like_tells_of_a_lora_that_is_gone(draw, run, file, tmp_path):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(file.read_bytes())
    (path,) = draw("a red fox", "--seed", 3, "--lora", gone).paths
    gone.unlink()
    done = run("--like", path)
    assert (done.code, done.paths) == (cli.MISTAKE, [])
    assert done.told == [
        f"error: {path} was drawn with the LoRA {gone}, which is not here; write --lora FILE"
    ]


def test_a_lora_that_was_trained_again_leaves_the_pictures_of_the_one_before(
    draw, run, load_once, configs, tmp_path
):
    """The settings name it by its path, which is the same."""
    path = write(tmp_path / "fox.safetensors", configs)
    (first,) = draw("a red fox", "--seed", 3, "--lora", path).paths
    before = first.read_bytes()
    assert draw("a red fox", "--seed", 3, "--lora", path).paths == [first]
    write(path, configs, seed=1)
    load_once.cache_clear()
    (second,) = draw("a red fox", "--seed", 3, "--lora", path).paths
    assert second.name == "00000-a-red-fox-2.png" and first.read_bytes() == before
    assert (pixels(first) != pixels(second)).any()
    told = run("--like", first, "--out", tmp_path / "again").told
    assert f"warning: {first} was drawn with another LoRA: {path} has changed since" in told
    for flags in (["--like", second], ["--like", first, "--lora", f"{path}=0.5"]):
        assert not any("changed" in line for line in run(*flags, "--out", tmp_path / "again").told)


def test_a_job_is_that_of_its_lora(job, draw, configs, file, tmp_path):
    rows = [{"prompt": "a red fox"}]
    flags = ("--format", "files")
    assert job(*flags, "--lora", f"{file}=0.5", rows=rows).code == cli.DONE
    (path,) = (tmp_path / "out").rglob("*.png")
    (single,) = draw("a red fox", "--seed", 7, "--lora", f"{file}=0.5", "--out", tmp_path / "single").paths
    # A job encodes its words in batches of another size.
    assert np.abs(pixels(path).astype(int) - pixels(single)).max() <= 1

    moved = tmp_path / "elsewhere" / file.name
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    assert job(*flags, "--lora", f"{moved}=0.5", rows=rows).code == cli.DONE  # all is done
    other = write(tmp_path / "other" / file.name, configs, seed=1)
    for value in ("", file, f"{other}=0.5"):
        refused = job(*flags, "--lora", value, rows=rows)
        assert refused.code == cli.MISTAKE
        assert "another job" in refused.told[-1] and "lora 'fox.safetensors=0.5 (" in refused.told[-1]


# ---- mistakes


def truncated(file, folder, configs):
    path = folder / "short.safetensors"
    path.write_bytes(file.read_bytes()[:-100])
    return path


def of_another_model(file, folder, configs):
    unet = tiny_model(unet={"block_out_channels": (8, 16)}).unet
    return write(folder / "other.safetensors", configs | {"unet": unet.config})


MISTAKES = {
    "missing": (lambda file, folder, configs: folder / "nowhere", "no LoRA", "nowhere"),
    "empty folder": (lambda file, folder, configs: folder, "pytorch_lora_weights.safetensors"),
    "truncated": (truncated, "short.safetensors is broken, or a download that stopped early"),
    "another model": (of_another_model, "other.safetensors does not fit this model: wrong shape: ("),
    "scale": (lambda file, *_: f"{file}=high", "write FILE or FILE=SCALE", "such as a.safetensors=0.8"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(draw, configs, file, tmp_path, case):
    make, *words = MISTAKES[case]
    done = draw("a red fox", "--lora", make(file, tmp_path, configs))
    assert (done.code, done.paths, len(done.told)) == (cli.MISTAKE, [], 1)
    assert all(word in done.told[0] for word in words), done.told
    assert not (tmp_path / "out").exists()


def test_weights_of_a_model_are_no_lora(draw, model):
    done = draw("a red fox", "--lora", model / "unet" / "diffusion_pytorch_model.safetensors")
    assert done.code == cli.MISTAKE and "holds no LoRA of PyTorch diffusers, such as unet." in done.told[0]


@pytest.mark.parametrize(
    "text, loras",
    [
        ("", ()),
        ("a.safetensors", (("a.safetensors", 1.0),)),
        ("a=0.8, b/c=-1e0,d", (("a", 0.8), ("b/c", -1.0), ("d", 1.0))),
        ("x=y=2", (("x=y", 2.0),)),
    ],
)
def test_how_files_and_scales_are_written(text, loras):
    assert GenerateConfig(lora=text).loras() == loras


@pytest.mark.parametrize("text", ["=1", "a=", "a=b", "a=nan", "a=inf", "a,", ",", "a=1=x"])
def test_how_they_are_not(text):
    with pytest.raises(UserError, match="write FILE or FILE=SCALE"):
        GenerateConfig(lora=text).loras()
