"""FID's network against PyTorch's: its resize to the bit, its features with random weights."""

import numpy as np
import pytest
import torch

from engine.models.inception import InceptionV3, resize
from tests.parity import inception
from tests.parity.common import Twin, assert_same, compiled, nchw
from tests.parity.inception import ORIGINALS, original


@pytest.fixture(scope="module", params=ORIGINALS)
def twin(request):
    return Twin(InceptionV3, original(request.param), "inception")


@pytest.fixture(params=ORIGINALS)
def their_resize(request):
    if request.param == ORIGINALS[0]:
        return inception.resize
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    return lambda images: theirs.interpolate_bilinear_2d_like_tensorflow1x(
        images, (299, 299), align_corners=False
    )


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Of coarse and fine structure, each with colours of its own."""
    rng = np.random.default_rng(height + width)
    coarse = np.kron(rng.integers(0, 200, (count, 4, 4, 3)), np.ones((1, -(-height // 4), -(-width // 4), 1)))
    return (coarse[:, :height, :width] + rng.integers(0, 56, (count, height, width, 3))).astype(np.uint8)


@pytest.mark.parametrize(
    "size",
    [(64, 64), (128, 128), (320, 200), (299, 299), (298, 301), (1, 1), (1, 700), (1023, 2), (777, 512)],
)
def test_resize(size, their_resize):
    """On the host bit for bit; on a device, which may round once where others round twice, almost so."""
    images = pictures(2, *size)
    tensor = torch.from_numpy(nchw(images).copy()).float()
    expected = their_resize(tensor).numpy()
    np.testing.assert_array_equal(nchw(resize(images)), expected)
    np.testing.assert_allclose(nchw(compiled(resize)(images)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (320, 200)])
def test_features(twin, size):
    """Within 1e-4 of what pictures differ by, which is a small part of the features."""
    images = pictures(3, *size)
    (expected,) = twin.theirs(nchw(images).copy())
    mean = expected.numpy().mean(0)
    assert_same(twin(resize(images)) - mean, expected.numpy() - mean)
