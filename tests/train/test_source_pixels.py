"""Whatever a picture is, it comes as 8-bit RGB, the right way up, not stretched."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.train.laid_out import SIZE, listed, made, saved, write


def seen(data: bytes, tmp_path: pathlib.Path, name: str = "0.png", **options) -> np.ndarray:
    folder = write(tmp_path / "data", {name: data, f"{pathlib.Path(name).stem}.txt": "a"})
    batches = made(folder, tmp_path, 1, **{"buckets": 1, **options})
    assert listed(tmp_path) == []
    return batches.rows(0, 0, 1)[0][0]


PAINTED = {
    "rgb": (Image.new("RGB", (SIZE, SIZE), (200, 40, 10)), (200, 40, 10)),
    "grey": (Image.new("L", (SIZE, SIZE), 77), (77, 77, 77)),
    "one bit": (Image.new("1", (SIZE, SIZE), 1), (255, 255, 255)),
    "16 bits": (Image.fromarray(np.full((SIZE, SIZE), 200 * 257 + 1, np.uint16)), (200, 200, 200)),
    "half clear": (Image.new("RGBA", (SIZE, SIZE), (200, 40, 0, 51)), (244, 212, 204)),
    "clear": (Image.new("RGBA", (SIZE, SIZE), (9, 9, 9, 0)), (255, 255, 255)),
    "grey and alpha": (Image.new("LA", (SIZE, SIZE), (0, 51)), (204, 204, 204)),
    "palette": (Image.new("RGB", (SIZE, SIZE), (200, 40, 10)).quantize(4), (200, 40, 10)),
}


@pytest.mark.parametrize("kind", PAINTED)
def test_modes(kind, tmp_path):
    image, colour = PAINTED[kind]
    found = seen(saved(image), tmp_path)
    assert found.shape == (SIZE, SIZE, 3) and np.abs(found.astype(int) - colour).max() <= 1


def test_a_clear_colour_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([10, 20, 30])
    assert (seen(saved(image, transparency=0), tmp_path) == 255).all()


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_other_formats(format, tmp_path):
    found = seen(saved(PAINTED["rgb"][0], format), tmp_path, f"0.{format.lower()}")
    assert np.abs(found.astype(int) - (200, 40, 10)).max() <= 4


def test_cmyk(tmp_path):
    found = seen(saved(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "JPEG"), tmp_path, "0.JPG")
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_is_honoured(turn, format, tmp_path):
    """A wide picture with a red corner, stored turned; told to turn it back, we see what was meant."""
    meant = Image.new("RGB", (48, 24), (0, 0, 128))
    meant.paste((255, 0, 0), (0, 0, 12, 12))
    exif = Image.Exif()
    exif[0x0112] = turn
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of each turn, as Pillow numbers them
    stored = meant.transpose(Image.Transpose(back[turn])) if turn > 1 else meant
    quality = {} if format == "PNG" else {"quality": 100}
    found = seen(
        saved(stored, format, exif=exif, **quality),
        tmp_path,
        f"0.{format.lower()}",
        buckets=3,
        max_aspect=2.0,
    )
    assert found.shape == (8, 24, 3)  # 2:1 of about 16 * 16 pixels in multiples of 8 is the widest
    red = (found[..., 0] > 128) & (found[..., 2] < 64)
    assert red[:2, :3].all() and red.sum() < 30


def test_large_jpegs_are_scaled_without_aliases(tmp_path):
    """Stripes of two pixels, 32 times too fine to be seen: an even grey."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    for n, format in enumerate(("JPEG", "PNG")):
        found = seen(saved(Image.fromarray(stripes), format), tmp_path / str(n), f"0.{format.lower()}")
        assert np.abs(found.astype(int) - 128).max() <= 3


def test_nothing_is_stretched(tmp_path):
    """A disc stays one in every shape: as wide as high."""
    for n, size in enumerate([(90, 60), (60, 90), (150, 40), (64, 64)]):
        image = np.zeros((size[1], size[0], 3), np.uint8)
        y, x = np.ogrid[: size[1], : size[0]]
        image[(x - size[0] / 2) ** 2 + (y - size[1] / 2) ** 2 < 15**2] = 255
        found = seen(saved(Image.fromarray(image)), tmp_path / str(n), buckets=5) / 255.0
        across, down = found[..., 0].sum(1).max(), found[..., 0].sum(0).max()
        assert abs(across / down - 1) < 0.08
