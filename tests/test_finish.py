"""From arrays to files: rounding, names, settings inside PNGs, sheets."""

import os
import random
import re
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from engine import finish
from engine.types import UserError

NASTY = [
    "",
    "   ",
    "a fox on a skateboard at sunset",
    "../../etc/passwd",
    "C:\\windows\\con:nul",
    "nul\0byte",
    "two\nlines\r\tand\x1b[31m escapes",
    "\u202egnp.xof \u200f\ufeff مرحبا שלום",
    "café ÅNGSTRÖM ﬁsh Ⅷ ½",
    "🦊🛹 日本語",
    "- - --",
    ".hidden",
    "x" * 500,
    "word " * 10_000,
    "lone \udcff surrogate",
    '{"json": "quote\\"s"}',
]


def random_text(count: int) -> list[str]:
    rng = random.Random(0)
    return [
        "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(30))
        for _ in range(count)
    ]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# uint8


def test_rounding_is_that_of_diffusers():
    x = np.random.default_rng(0).uniform(-1.3, 1.3, (2, 32, 32, 3)).astype(np.float32)
    halves = (np.arange(256, dtype=np.float32) + 0.5) / 255 * 2 - 1  # every tie, give or take one ulp
    x[0].flat[:256], x[0].flat[256:512], x[1].flat[:256] = (
        halves,
        np.nextafter(halves, 2),
        np.nextafter(halves, -2),
    )
    processor = VaeImageProcessor()
    expected = np.stack([np.asarray(i) for i in processor.postprocess(_torch(x), output_type="pil")])
    np.testing.assert_array_equal(finish.to_uint8(x), expected)
    np.testing.assert_array_equal(finish.to_uint8(jnp.asarray(x)), expected)
    np.testing.assert_array_equal(jax.jit(finish.to_uint8)(x), expected)


def _torch(x):
    import torch

    return torch.from_numpy(x).permute(0, 3, 1, 2)


def test_every_level_survives_the_way_there_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(finish.to_uint8(levels.astype(dtype) / 127.5 - 1), levels)
    extremes = np.array([-np.inf, -5, -1, 1, 5, np.inf], np.float32).reshape(1, 1, 6, 1)
    assert finish.to_uint8(extremes).ravel().tolist() == [0, 0, 0, 255, 255, 255]


def test_check_finite_names_the_pictures():
    x = np.zeros((5, 4, 4, 2), np.float32)
    assert finish.check_finite(x) == []
    x[1, 3, 3, 1], x[4, 0, 0, 0] = np.nan, -np.inf
    assert finish.check_finite(x) == [1, 4]
    assert finish.check_finite(jnp.asarray(x, jnp.bfloat16)) == [1, 4]
    assert finish.check_finite(noise(2, 4, 4, 3)) == []


# names


def test_slug_is_a_harmless_name():
    for prompt in [*NASTY, *random_text(500)]:
        for limit in (1, 7, 60):
            assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", finish.slug(prompt, limit)), ascii(prompt)
            assert len(finish.slug(prompt, limit)) <= max(limit, len("picture"))


def test_slugs_known():
    assert finish.slug("A fox, on a skate-board!") == "a-fox-on-a-skate-board"
    assert finish.slug("Café Ångström") == "cafe-angstrom"
    assert finish.slug("🦊") == finish.slug("") == "picture"
    assert finish.slug("a fox on a skateboard", 12) == "a-fox-on-a"  # cut between words
    assert finish.slug("a fox on a", 10) == "a-fox-on-a"
    assert finish.slug("skateboard", 5) == "skate"
    assert finish.picture_name(7, "a fox") == "00007-a-fox.png"
    assert finish.picture_name(1234567, "a/fox") == "1234567-a-fox.png"


# settings inside


@pytest.mark.parametrize("prompt", NASTY, ids=range(len(NASTY)))
def test_settings_survive(tmp_path, prompt):
    settings = {
        "prompt": prompt,
        "negative_prompt": prompt[::-1],
        "seed": 2**63,
        "guidance_scale": 5.0,
        "sigmas": [1.5, 0.1],
        "model": None,
        "nested": {"a": True},
    }
    image = noise(8, 6, 3)
    path = tmp_path / finish.picture_name(3, prompt)
    finish.write_png(path, image, settings)
    assert finish.read_settings(path) == settings
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_settings_are_readable_to_people(tmp_path):
    finish.write_png(
        tmp_path / "a.png",
        noise(4, 4, 3),
        {"prompt": "a fox\0 🦊", "negative_prompt": "fog", "steps": 30, "guidance_scale": 5.0},
    )
    text = Image.open(tmp_path / "a.png").info["parameters"]
    assert text == "a fox\N{REPLACEMENT CHARACTER} 🦊\nNegative prompt: fog\nSteps: 30, Guidance scale: 5.0"


def test_equal_input_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        finish.write_png(tmp_path / name, noise(8, 8, 3), {"prompt": "a fox", "seed": 1})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_settings_too_long_to_read_back_are_not_written(tmp_path):
    with pytest.raises(UserError, match="shorter prompt"):
        finish.write_png(tmp_path / "a.png", noise(4, 4, 3), {"prompt": "x" * finish.SETTINGS_LIMIT})
    long = {"prompt": "x" * (finish.SETTINGS_LIMIT - 20)}
    finish.write_png(tmp_path / "b.png", noise(4, 4, 3), long)
    assert finish.read_settings(tmp_path / "b.png") == long


def test_every_truncation_is_noticed(tmp_path):
    finish.write_png(tmp_path / "whole.png", noise(8, 8, 3), {"prompt": "a fox"})
    data = (tmp_path / "whole.png").read_bytes()
    path = tmp_path / "cut.png"
    for length in range(len(data) - 4):  # the last four are the checksum of the empty end mark
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.png: it is damaged or no PNG"):
            finish.read_settings(path)


def test_damaged_settings_are_never_believed(tmp_path):
    settings = {"prompt": "a fox on a skateboard", "seed": 7}
    finish.write_png(tmp_path / "whole.png", noise(8, 8, 3), settings)
    data = (tmp_path / "whole.png").read_bytes()
    rng, path = random.Random(0), tmp_path / "bad.png"
    refused = 0
    for _ in range(300):
        spoilt = bytearray(data)
        spoilt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        try:
            assert finish.read_settings(path) == settings  # the flipped bit was in no checked place
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 290


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra: bytes, size: tuple[int, int] = (1, 1)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(4)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def itxt(text: bytes, compress: bool = False) -> bytes:
    body = zlib.compress(text) if compress else text
    return chunk(b"iTXt", b"fogsculpt\0" + bytes([compress]) + b"\0\0\0" + body)


HOSTILE = {
    "no settings": (png(), "no settings inside"),
    "no json": (png(itxt(b"{")), "settings are damaged"),
    "not an object": (png(itxt(b"[1]")), "settings are damaged"),
    "deep": (png(itxt(b"[" * 10**6)), "settings are damaged"),
    "deep object": (png(itxt(b'{"a":' * 10**5)), "settings are damaged"),
    "long number": (png(itxt(b'{"a": ' + b"9" * 10**5 + b"}")), "settings are damaged"),
    "too long": (png(itxt(b'{"a": "' + b"x" * finish.SETTINGS_LIMIT + b'"}')), "settings are damaged"),
    "compressed bomb": (png(itxt(b'{"a": "' + b"x" * 10**8 + b'"}', compress=True)), "no PNG|no settings"),
    "absurd size": (png(itxt(b"{}"), size=(2**31 - 1, 2**31 - 1)), "too large"),
    "rather large": (png(itxt(b"{}"), size=(12_000, 12_000)), "too large"),
    "other format": (b"RIFF\x24\0\0\0WEBPVP8 ", "no PNG"),
    "empty": (b"", "no PNG"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pngs_are_refused(tmp_path, case):
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        finish.read_settings(path)
    assert "\n" not in str(error.value) and "hostile.png" in str(error.value)


def test_large_pictures_say_how_they_were_made(tmp_path, monkeypatch):
    """Those of more pixels than Pillow opens, as --upscale makes them; of one colour, the smallest file."""
    path, side = tmp_path / "large.png", 3000
    finish.write_png(path, np.zeros((side, side, 3), np.uint8), {"prompt": "a fox", "upscale": 10})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", side**2 // 3)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert finish.read_settings(path) == {"prompt": "a fox", "upscale": 10}


def test_honest_png_of_another_writer(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(itxt(b'{"prompt": "a fox"}', compress=True)))
    assert finish.read_settings(path) == {"prompt": "a fox"}


def test_settings_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(finish.FILE_LIMIT + 1)  # sparse: takes no room
    for name, message in (
        ("none.png", "no such file"),
        ("", "no such file"),
        ("pipe", "no such file"),
        ("huge.png", "MiB"),
    ):
        with pytest.raises(UserError, match=message):
            finish.read_settings(tmp_path / name)


def test_settings_that_json_cannot_say_are_a_bug(tmp_path):
    for value in (object(), float("nan"), np.int64(3)):
        with pytest.raises((TypeError, ValueError)) as error:
            finish.write_png(tmp_path / "a.png", noise(4, 4, 3), {"x": value})
        assert not isinstance(error.value, UserError)
    assert list(tmp_path.iterdir()) == []


# sheets and animations


def test_contact_sheet_holds_every_picture():
    images = noise(5, 6, 4, 3)
    sheet = finish.contact_sheet(images, gap=2)
    assert sheet.shape == (2 * 8 + 2, 3 * 6 + 2, 3)  # 5 pictures: 3 columns, 2 rows
    for i, image in enumerate(images):
        top, left = 2 + i // 3 * 8, 2 + i % 3 * 6
        np.testing.assert_array_equal(sheet[top : top + 6, left : left + 4], image)
        sheet[top : top + 6, left : left + 4] = 255
    assert (sheet == 255).all()  # all else is paper


def test_labels_stay_under_their_picture():
    images = np.full((4, 40, 50, 3), 128, np.uint8)
    labels = ["a fox", "a very long label that cannot fit\nat all", "", "caf\u00e9\0 \u202e مرحبا"]
    sheet = finish.contact_sheet(images, columns=2, gap=3, labels=labels)
    height, width = (sheet.shape[0] - 3) // 2, (sheet.shape[1] - 3) // 2
    for i in range(4):
        top, left = 3 + i // 2 * height, 3 + i % 2 * width
        np.testing.assert_array_equal(sheet[top : top + 40, left : left + 50], images[i])
        below = sheet[top + 40 : top + height, left : left + 50]
        assert (below < 255).any() == bool(labels[i])
    edges = np.r_[0:3, width : width + 3, 2 * width : 2 * width + 3]
    assert (sheet[:, edges] == 255).all()


def test_strip_is_one_row_or_two():
    frames, predictions = noise(4, 5, 5, 3), noise(4, 5, 5, 3, seed=1)
    row = finish.strip(frames, gap=1)
    assert row.shape == (7, 25, 3)
    both = finish.strip(frames, predictions, gap=1)
    np.testing.assert_array_equal(both[:6], row[:6])
    np.testing.assert_array_equal(both[7:], finish.strip(predictions, gap=1)[1:])


def test_light_falls_where_a_word_is_heeded():
    image = np.full((4, 4, 3), 200, np.uint8)
    heat = np.ones((4, 4), np.float32)
    heat[1, 2] = 4
    heat *= 0.3 / heat.mean()  # whatever the sum: what counts is how many times the mean
    times = heat / heat.mean()
    lit = finish.lit(image, heat, most=float(times.max()))
    assert (lit[1, 2] == 200).all() and (np.delete(lit[..., 0].ravel(), 6) == 200 * finish.DARK).all()
    half = finish.lit(image, heat, most=float(times.max()) ** 2)  # half way on a logarithmic scale
    assert (half[1, 2] == round(200 * (1 + finish.DARK) / 2)).all()
    assert (finish.lit(image, np.ones((2, 2), np.float32), most=1.0) == 200 * finish.DARK).all()


def test_a_sheet_of_words_has_one_scale():
    image = np.full((32, 32, 3), 200, np.uint8)
    strong, weak = np.ones((2, 32, 32), np.float32)
    strong[:8, :8], weak[:8, 8:16] = 9, 2
    sheet = finish.words_sheet(image, [("fox", strong), ("on", weak)])
    assert sheet.shape == (2 * (32 + 16 + 4) + 4, 2 * 36 + 4, 3)
    parts = [sheet[top : top + 32, left : left + 32] for top, left in ((4, 4), (4, 40), (56, 4))]
    np.testing.assert_array_equal(parts[0], image)
    np.testing.assert_array_equal(parts[1], finish.lit(image, strong, float(strong.max() / strong.mean())))
    assert parts[1].max() == 200 and 200 * finish.DARK < parts[2].max() < 120


def test_words_without_ascii_are_numbered_and_large_sheets_made_smaller(monkeypatch):
    image, heat = np.full((64, 32, 3), 200, np.uint8), np.ones((4, 2), np.float32)
    told = {}

    def contact_sheet(images, labels):
        told.update(labels=labels, shape=images.shape)
        return images[0]

    monkeypatch.setattr(finish, "contact_sheet", contact_sheet)
    finish.words_sheet(image, [("fox", heat), ("\u732b", heat)])
    assert told == {"labels": ["", "1.0 fox", "1.0 (word 2)"], "shape": (3, 64, 32, 3)}
    monkeypatch.setattr(finish, "WORDS_PIXELS", 3 * 64 * 32 // 4)
    finish.words_sheet(image, [("fox", heat), ("\u732b", heat)])
    assert told["shape"] == (3, 32, 16, 3)


def test_upscale():
    image = noise(5, 7, 3)
    np.testing.assert_array_equal(finish.upscale(image, 1), image)
    assert finish.upscale(image, 4).shape == (20, 28, 3)
    flat = np.full((4, 4, 3), (10, 200, 30), np.uint8)
    np.testing.assert_array_equal(finish.upscale(flat, 3), np.full((12, 12, 3), (10, 200, 30), np.uint8))
    with pytest.raises(UserError, match="whole number from 1"):
        finish.upscale(image, 0)


def test_animation_lingers_on_the_last_frame(tmp_path):
    colours = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (3, 16, 16, 3)).copy()
    path = tmp_path / "a.webp"
    finish.write_animation(path, frames, duration=80, linger=1500)
    with Image.open(path) as animation:
        assert (animation.format, animation.n_frames, animation.info["loop"]) == ("WEBP", 3, 0)
        shown = []
        for i in range(3):
            animation.seek(i)
            animation.load()
            shown.append(animation.info["duration"])
            assert np.abs(np.asarray(animation.convert("RGB"))[8, 8].astype(int) - colours[i]).max() < 16
    assert shown == [80, 80, 1500]
    assert [p.name for p in tmp_path.iterdir()] == ["a.webp"]
