"""Which tokens join which, and what comes back: against the authors' code, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomesd.merge
import torch

from engine.models import merging
from engine.models.unet_config import UNetConfig


@pytest.mark.parametrize("height, width, share", [(4, 6, 0.5), (5, 7, 0.3), (6, 6, 0.75), (2, 9, 0.9)])
def test_as_the_authors_merge(height, width, share):
    tokens = jax.random.normal(jax.random.key(0), (3, height * width, 8))
    values = jax.random.normal(jax.random.key(1), (3, height * width, 5))
    with merging.merging(share, (height, width)):
        ours = merging.chosen(height, width)(tokens)
    count = int(height * width * share)
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        torch.from_numpy(np.array(tokens)), width, height, 2, 2, count, no_rand=True
    )
    theirs = merge(torch.from_numpy(np.array(values)))
    together = ours.together(values)
    assert together.shape == theirs.shape
    for a, b in zip(np.asarray(together), theirs.numpy(), strict=True):  # in whatever order
        np.testing.assert_allclose(a[np.lexsort(a.T)], b[np.lexsort(b.T)], atol=1e-5)
    np.testing.assert_allclose(ours.apart(together), unmerge(theirs).numpy(), atol=1e-5)


def test_two_that_are_alike_become_their_mean():
    """A 2 x 2: token 3 is most like the anchor, token 0."""
    x = jnp.array([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [2.0, 0.2]]])
    tokens = merging.merged(x, height=2, width=2, count=1)
    together = tokens.together(x)
    np.testing.assert_allclose(sorted(together[0].tolist()), [[-1, 0], [0, 1], [1.5, 0.1]], atol=1e-6)
    np.testing.assert_allclose(
        tokens.apart(together)[0], [[1.5, 0.1], [0, 1], [-1, 0], [1.5, 0.1]], atol=1e-6
    )


def test_a_token_of_zeros_is_no_nan():
    x = jnp.zeros((1, 16, 3))
    tokens = merging.merged(x, height=4, width=4, count=8)
    assert np.isfinite(tokens.apart(tokens.together(x))).all()


def test_other_sizes_and_no_share_stay_apart():
    with merging.merging(0.5, (8, 8)):
        assert merging.chosen(8, 8) is not None
        assert merging.chosen(4, 4) is None
    with merging.merging(0.0, (8, 8)):
        assert merging.chosen(8, 8) is None
    with merging.merging(0.5, (1, 8)):
        assert merging.chosen(1, 8) is None  # there is no 2 x 2
    assert merging.chosen(8, 8) is None


def test_the_finest_level_whose_pixels_attend():
    assert UNetConfig().finest_attention(65, 64) == (65, 64)
    xl = UNetConfig(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    assert xl.finest_attention(127, 128) == (64, 64)
