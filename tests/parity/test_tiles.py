"""Decoding in tiles against diffusers' tiled_decode, with the same weights and tiles."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Original

from engine.models import tiles
from engine.models.autoencoder import AutoencoderConfig, AutoencoderKL
from engine.types import UserError
from tests.parity.common import Twin, assert_same, compiled, difference, nchw, nhwc, normal

TILE = 8  # latents
SCALE = 2


@pytest.fixture(scope="module")
def twin() -> Twin:
    original = Original(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=TILE * SCALE,
    )
    assert original.tile_latent_min_size == TILE
    config = AutoencoderConfig.from_json(json.loads(original.to_json_string()), "vae/config.json")
    return Twin(lambda rngs: AutoencoderKL(config, rngs), original, "vae")


def decoded(twin: Twin, z: np.ndarray, tile: int = TILE) -> np.ndarray:
    def run(params, z):
        return tiles.decode_in_tiles(lambda z: twin.apply(params, z, method="decode"), z, tile, SCALE)

    return compiled(run)(twin.params, nhwc(z))


@pytest.mark.parametrize(
    ("h", "w"),
    [(18, 24), (14, 13), (7, 19), (9, 8)],
    ids=["tiles of one size a side", "slivers at the edges", "one row", "just above a tile"],
)
def test_as_in_pytorch(twin, h, w):
    z = normal(2, 4, h, w)
    with torch.no_grad():
        wanted = twin.original.tiled_decode(torch.from_numpy(z)).sample
    found = nchw(decoded(twin, z))
    assert_same(found, wanted)
    assert difference(found, nchw(twin(nhwc(z), method="decode"))) > 1e-2, "tiles made no difference"


@pytest.mark.parametrize(("h", "w", "tile"), [(8, 8, 8), (5, 8, 8), (9, 10, 0), (9, 10, 12)])
def test_a_picture_no_larger_than_a_tile_is_decoded_whole(twin, h, w, tile):
    z = normal(1, 4, h, w)
    whole = compiled(lambda p, z: twin.apply(p, z, method="decode"))(twin.params, nhwc(z))
    np.testing.assert_array_equal(decoded(twin, z, tile), whole)


def test_memory_is_that_of_a_tile(twin):
    """And of a few pictures, of what the compiler says that it needs beside its arguments."""

    def needed(side: int, tile: int) -> int:
        def run(params, z):
            return tiles.decode_in_tiles(lambda z: twin.apply(params, z, method="decode"), z, tile, SCALE)

        z = jax.ShapeDtypeStruct((1, side, side, 4), np.float32)
        return compiled(run).lower(twin.params, z).compile().memory_analysis().temp_size_in_bytes

    picture = (96 * SCALE) ** 2 * 3 * 4
    tiles_of_12 = needed(96, 12)
    assert tiles_of_12 < needed(12, 0) + 6 * picture
    assert tiles_of_12 < needed(96, 0) / 5


@pytest.mark.parametrize(
    ("tile", "good"), [(-64, 32), (1, 32), (100, 96), (500, 512)], ids=["negative", "1", "100", "500"]
)
def test_tiles_without_quarters_are_refused(tile, good):
    with pytest.raises(UserError, match=f"tile={tile}: .* multiples of 32 pixels; write {good}, or 0"):
        tiles.check_tile(tile, 8)
    tiles.check_tile(good, 8)
    tiles.check_tile(0, 8)
