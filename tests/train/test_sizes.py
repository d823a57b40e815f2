"""What SDXL is told of sizes and crops is what a picture shows: its colours say where its pixels were."""

import numpy as np
import pytest
from PIL import Image

from engine.pixels import Crop, sizes
from tests.train.laid_out import made, saved, write

WIDE, TALL = (96, 40), (30, 120)  # width, height
SIDE = 16


def ramps(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, from 0 to 255."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.zeros((height, width, 3))
    pixels[..., 0], pixels[..., 1] = across, down[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("flip", [0.0, 1.0], ids=["straight", "mirrored"])
@pytest.mark.parametrize("shape", [WIDE, TALL, (16, 16), (9, 12)], ids=str)
def test_sizes_say_where_a_crop_was(shape, flip, tmp_path):
    folder = write(tmp_path / "data", {"0.png": saved(ramps(*shape)), "0.txt": "a"})
    batches = made(folder, tmp_path, 4, buckets=1, crop="random", flip=flip)
    scale = SIDE / min(shape)
    seen = set()
    for step in range(3):
        for image, told in zip(*batches.rows(step, 0, 4)[::2], strict=True):
            height, width, top, left, *new = told.tolist()
            assert ((width, height), new) == (shape, [SIDE, SIDE])
            red, green = image[..., 0].mean() / 255, image[..., 1].mean() / 255  # of the middle
            across = (1 - red if flip else red) * shape[0] * scale - SIDE / 2
            assert left == pytest.approx(across, abs=1.5)
            assert top == pytest.approx(green * shape[1] * scale - SIDE / 2, abs=1.5)
            seen.add((top, left))
    assert len(seen) > 3 if max(shape) > 2 * min(shape) else len(seen) <= 8


def test_sizes_are_those_of_diffusers_scripts():
    """train_text_to_image_sdxl.py: the shorter side becomes 1024; original size, crop, target size; y, x."""
    assert sizes(1500, 1000, 1024, 1024, Crop(0.0, 0.0)).tolist() == [1000, 1500, 0, 0, 1024, 1024]
    assert sizes(1500, 1000, 1024, 1024, Crop(1.0, 0.5)).tolist() == [1000, 1500, 0, 512, 1024, 1024]
    assert sizes(1500, 1000, 1024, 1024, Crop(1.0, 0.5, True)).tolist() == [1000, 1500, 0, 0, 1024, 1024]
    assert sizes(600, 800, 768, 1024, Crop()).tolist() == [800, 600, 0, 0, 1024, 768]
