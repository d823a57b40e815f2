"""FID's features of batches and of folders are those of the network in PyTorch, with random weights."""

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from engine.evaluate.fid import Features
from engine.models.inception import WIDTH
from engine.types import UserError
from tests.compiled import COMPILED
from tests.parity.common import assert_same, nchw
from tests.parity.inception import original

BATCH = 4


@pytest.fixture(scope="module")
def theirs():
    return original()


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    safetensors.torch.save_file(theirs.state_dict(), file)
    yield file
    file.unlink()  # 96 MB


@pytest.fixture(scope="module")
def ours(weights):
    return Features(weights, batch_size=BATCH)


def pictures(count: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * width)
    colours = rng.integers(0, 200, (count, 1, 1, 3))
    return (colours + rng.integers(0, 56, (count, height, width, 3))).astype(np.uint8)


def expected(theirs, images) -> torch.Tensor:
    """Of uint8 pictures of any sizes, one after another."""
    return torch.cat([theirs(torch.from_numpy(nchw(image[None]).copy()))[0] for image in images])


def test_batches_of_any_length_and_size(theirs, ours):
    """In their order; the network is compiled once, whatever there is to fill up."""
    before = COMPILED["jit(_apply)"]
    small, wide = pictures(6, 32, 32), pictures(2, 24, 40)
    found = list(ours.features([small[:1], small[1:6], wide[:1], wide[1:], small[:0], small[:1]]))
    assert [len(part) for part in found] == [4, 2, 2, 1]
    assert_same(np.concatenate(found), expected(theirs, [*small, *wide, small[0]]))
    list(ours.features([pictures(1, 40, 24)]))
    assert COMPILED["jit(_apply)"] == before + 1


def test_moments(theirs, ours):
    images = pictures(6, 32, 32)
    moments = ours.moments([images[:5], images[5:]])
    features = expected(theirs, images).double().numpy()
    assert moments.n == 6
    assert_same(moments.mean, features.mean(0))
    assert_same(moments.covariance, np.cov(features, rowvar=False), 1e-3)
    with pytest.raises(UserError, match="no pictures"):
        ours.moments([])


def test_folder_of_many_sizes(theirs, ours, tmp_path):
    """PNG, JPEG and WebP, grey and transparent ones, some below; but not what is hidden or no picture."""
    (tmp_path / "below" / "it").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    saved = {
        "a.png": Image.fromarray(pictures(1, 32, 32)[0]),
        "below/b.jpg": Image.fromarray(pictures(1, 400, 310)[0]),
        "below/c.JPEG": Image.fromarray(pictures(1, 17, 90)[0]).convert("L"),
        "below/it/d.webp": Image.fromarray(pictures(1, 64, 48)[0]),
        "e.png": Image.fromarray(np.concatenate([pictures(1, 30, 20)[0]] * 2, axis=-1)[..., :4]),
    }
    for name, image in saved.items():
        image.save(tmp_path / name)
    saved["a.png"].save(tmp_path / ".hidden" / "f.png")
    saved["a.png"].save(tmp_path / ".f.png")
    (tmp_path / "notes.txt").write_text("no picture")

    read = [np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in saved]
    features = expected(theirs, read).double().numpy()
    moments = ours.folder_moments(tmp_path)
    assert moments.n == len(saved)
    assert_same(moments.mean, features.mean(0))
    assert_same(moments.covariance, np.cov(features, rowvar=False), 1e-3)
    assert moments.mean.shape == (WIDTH,)


def test_folders_without_pictures(ours, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        ours.folder_moments(tmp_path / "none")
    with pytest.raises(UserError, match="holds no pictures"):
        ours.folder_moments(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png cannot be read") as error:
        ours.folder_moments(tmp_path)
    assert "\n" not in str(error.value)


def test_no_batch(weights):
    with pytest.raises(UserError, match="write 1 or more"):
        Features(weights, batch_size=0)
