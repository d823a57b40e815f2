"""--decoder and --tile: other pictures, remembered in them and in jobs; their mistakes in one line."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from engine import finish
from engine.weights.decoder import with_decoder
from engine.weights.folder import load_folder
from engine.weights.original_names import VAE
from engine.weights.single_file_written import to_file
from launch import cli
from tests.tiny import TINY_VAE, tiny_folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with an AutoencoderTiny."""
    return tiny_folder(tmp_path_factory.mktemp("small") / "model", vae=TINY_VAE)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_decoder_changes_the_picture_which_remembers_it(draw, run, small, tmp_path):
    (without,) = draw("a red fox", "--seed", 3).paths
    (with_it,) = draw("a red fox", "--seed", 3, "--decoder", small).paths
    assert np.abs(pixels(without) - pixels(with_it)).mean() > 5
    assert finish.read_settings(with_it)["decoder"] == str(small)
    assert "decoder" not in finish.read_settings(without)
    again = run("--like", with_it, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == with_it.read_bytes()

    (whole_model,) = draw("a red fox", "--seed", 3, "--model", small).paths
    (part,) = draw("a red fox", "--seed", 3, "--decoder", small / "vae").paths
    np.testing.assert_array_equal(pixels(part), pixels(with_it))
    np.testing.assert_array_equal(pixels(whole_model), pixels(with_it))  # the rest of the two is the same


def test_a_decoder_in_a_file(draw, run, tmp_path):
    """In the original layout, within a whole model or alone, and in that of diffusers; with its training."""
    other = tiny_folder(tmp_path / "other", seed=5)
    to_file(other, whole := tmp_path / "whole.safetensors")
    tensors = load_file(whole)
    alone = {key.removeprefix(VAE): array for key, array in tensors.items() if key.startswith(VAE)}
    alone |= {"loss.logvar": np.zeros((), np.float32), "model_ema.decay": np.zeros((), np.float32)}
    save_file(alone, bare := tmp_path / "bare.safetensors")
    theirs = other / "vae" / "diffusion_pytorch_model.safetensors"

    model = load_folder(tiny_folder(tmp_path / "model"))
    expected = jax.tree.leaves(load_folder(other).vae.params)
    for file in (whole, bare, theirs):
        found = jax.tree.leaves(with_decoder(model, file).vae.params)
        assert all(map(np.array_equal, found, expected))
    (path,) = draw("a red fox", "--seed", 3, "--decoder", bare).paths
    again = run("--like", path, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == path.read_bytes()

    del alone["decoder.conv_in.bias"]
    save_file(alone, less := tmp_path / "less.safetensors")
    for file, told in (
        (less, "is no autoencoder, or built otherwise than the model's"),
        (tmp_path / "vae.ckpt", "is in a format that is never opened"),
        (tmp_path / "none.safetensors", "no decoder"),
    ):
        refused = draw("a red fox", "--decoder", file)
        assert refused.code == cli.MISTAKE and told in refused.told[-1]


def test_a_decoder_of_other_latents_is_refused(draw, tmp_path):
    other = tiny_folder(tmp_path / "other", vae={"scaling_factor": 0.18215})
    refused = draw("a red fox", "--decoder", other)
    assert refused.code == cli.MISTAKE
    assert "has scaling_factor 0.18215, the model 0.5" in refused.told[-1]


def test_a_tile_changes_larger_pictures_alone(draw, run, tmp_path):
    (without,) = draw("a red fox", "--seed", 3).paths
    (no_larger,) = draw("a red fox", "--seed", 3, "--tile", 16).paths
    np.testing.assert_array_equal(pixels(no_larger), pixels(without))
    (tiles,) = draw("a red fox", "--seed", 3, "--tile", 8).paths
    assert (pixels(tiles) != pixels(without)).any()
    assert finish.read_settings(tiles)["tile"] == 8 and "tile" not in finish.read_settings(without)
    again = run("--like", tiles, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == tiles.read_bytes()


def test_a_job_is_that_of_its_decoder_and_tile(job, draw, small, tmp_path):
    flags, rows = ("--format", "files", "--tile", 8), [{"prompt": "a red fox"}]
    assert job(*flags, "--decoder", small, rows=rows).code == cli.DONE
    (path,) = (tmp_path / "out").rglob("*.png")
    how = ("--seed", 7, "--tile", 8, "--decoder", small, "--out", tmp_path / "single")
    (single,) = draw("a red fox", *how).paths
    # A job encodes its words in batches of another size.
    assert np.abs(pixels(path) - pixels(single)).max() <= 1

    moved = shutil.copytree(small / "vae", tmp_path / "elsewhere")
    assert job(*flags, "--decoder", moved, rows=rows).code == cli.DONE  # all is done
    for other, word in ((flags, "decoder"), (("--decoder", small), "tile 8 there and None here")):
        refused = job("--format", "files", *other, rows=rows)
        assert refused.code == cli.MISTAKE
        assert "another job" in refused.told[-1] and word in refused.told[-1]


def test_like_tells_of_a_decoder_that_is_gone(draw, run, small, tmp_path):
    gone = shutil.copytree(small / "vae", tmp_path / "gone")
    (path,) = draw("a red fox", "--seed", 3, "--decoder", gone).paths
    shutil.rmtree(gone)
    done = run("--like", path)
    assert (done.code, done.paths) == (cli.MISTAKE, [])
    assert done.told == [
        f"error: {path} was drawn with the decoder {gone}, which is not here; write --decoder FOLDER"
    ]


# ---- mistakes


def truncated(folder, small):
    shutil.copytree(small / "vae", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return folder


def empty(folder, small):
    folder.mkdir()
    return folder


def other(**options):
    return lambda folder, small: tiny_folder(folder, vae=TINY_VAE | options) / "vae"


MISTAKES = {
    "missing": (lambda folder, small: folder, "no decoder ", "config.json, a model's with vae/ in it, or a"),
    "empty": (empty, "holds no decoder: looked for config.json"),
    "another part": (
        lambda folder, small: small / "unet",
        "describes a UNet2DConditionModel; the engine reads",
    ),
    "truncated": (truncated, "diffusion_pytorch_model.safetensors is broken"),
    "other latents": (other(latent_channels=8), "has 8 latent_channels, the model 4; give one"),
    "other scale": (
        other(
            **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * 3),
            **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,) * 3),
        ),
        "has 4 pixels a side to a latent, the model 2; give one",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(draw, small, tmp_path, case):
    make, *words = MISTAKES[case]
    done = draw("a red fox", "--decoder", make(tmp_path / "other", small))
    assert (done.code, done.paths, len(done.told)) == (cli.MISTAKE, [], 1)
    assert all(word in done.told[0] for word in words), done.told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (12, "tile=12: this model takes tiles of multiples of 8 pixels; write 16, or 0"),
        (-8, "tile=-8 is out of range; write 0 to 16384"),
    ],
)
def test_a_wrong_tile_is_one_line(draw, tile, message):
    done = draw("a red fox", "--tile", tile)
    assert (done.code, done.paths, done.told) == (cli.MISTAKE, [], [f"error: {message}"])
