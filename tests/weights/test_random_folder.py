"""Folders with random weights load like real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from engine.models.autoencoder import AutoencoderConfig
from engine.models.clip import CLIPTextConfig
from engine.models.unet import UNetConfig
from engine.types import UserError
from engine.weights.folder import load_folder
from engine.weights.random_folder import ARCHITECTURES, Architecture, random_folder
from tests.weights.conftest import TEXT, UNET, VAE

TINY = Architecture(
    UNetConfig(**UNET), AutoencoderConfig(**VAE), CLIPTextConfig(**TEXT), ARCHITECTURES["sd15"].scheduler
)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_loads_and_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        random_folder(tmp_path / name, TINY, "float32", seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    model = load_folder(tmp_path / "a")
    assert model.unet.config == TINY.unet
    assert model.scheduler.class_name == "PNDMScheduler"


def test_activations_would_keep_their_scale(tmp_path):
    """Kernels have variance 1 / fan-in; no two tensors are alike."""
    random_folder(tmp_path / "model", TINY, "float32")
    leaves = traverse_util.flatten_dict(load_folder(tmp_path / "model").unet.params)
    kernels = {path: leaf for path, leaf in leaves.items() if path[-1] == "kernel" and leaf.size > 1000}
    for path, leaf in kernels.items():
        fan_in = leaf.size // leaf.shape[-1]
        np.testing.assert_allclose(leaf.var() * fan_in, 1, rtol=0.2, err_msg=str(path))
    assert len({float(leaf.reshape(-1)[0]) for leaf in kernels.values()}) == len(kernels)
    assert all((leaf == (path[-1] == "scale")).all() for path, leaf in leaves.items() if leaf.ndim == 1)


@pytest.mark.parametrize("vocab_size", [514, 515, 600, 5000])
def test_the_tokenizer_has_an_id_for_every_embedding(tmp_path, vocab_size):
    text = CLIPTextConfig(**TEXT | {"vocab_size": vocab_size})
    random_folder(tmp_path / "model", TINY._replace(text_encoder=text))
    tokenizer = load_folder(tmp_path / "model").tokenizer
    assert tokenizer.vocab_size == vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (vocab_size - 2, vocab_size - 1)
    assert tokenizer.encode(["aardvark 7!"]).max() < vocab_size


def test_dtype_on_disk(tmp_path):
    random_folder(tmp_path / "model", TINY, "bfloat16")
    exact = load_folder(tmp_path / "model", dtype="bfloat16")
    wide = load_folder(tmp_path / "model", dtype="float32")
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), exact.vae.params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, widened, wide.vae.params))


def test_what_cannot_be_made(tmp_path):
    with pytest.raises(
        UserError,
        match=r"unknown architecture 'ds15' \(did you mean sd15\?\); known: sd15, sd21, sdxl, sdxl-r",
    ):
        random_folder(tmp_path / "model", "ds15")
    small = CLIPTextConfig(**TEXT | {"vocab_size": 100})
    with pytest.raises(UserError, match="vocab_size=100 is too small: write at least 514"):
        random_folder(tmp_path / "model", TINY._replace(text_encoder=small))
    assert list(tmp_path.iterdir()) == []
