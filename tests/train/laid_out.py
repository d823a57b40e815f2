"""Small pictures with captions, laid out in every way that training reads."""

import io
import json
import pathlib

import numpy as np
from PIL import Image

from engine import finish
from engine.config import DataConfig
from engine.jobs.formats import Entry, write_shard
from engine.train.sources.batches import PictureBatches
from engine.train.sources.skipped import Skipped

SIZES = [(40, 30), (30, 40), (32, 32), (64, 20), (33, 31), (20, 64), (50, 40)]
WORDS = ["a red fox", "a blue car", "a cat", "two trees", "a hill", "sea", "a boat, at night"]
SIZE = 16


def picture(number: int) -> Image.Image:
    width, height = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def png(number: int) -> bytes:
    return finish.encode_png(np.asarray(picture(number)), {"prompt": WORDS[number % len(WORDS)]})


def write(folder: pathlib.Path, files: dict[str, bytes | str]) -> pathlib.Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def entries(numbers: range) -> list[Entry]:
    texts = {"negative_prompt": "", "sampler": "euler", "sha256": "", "extra": {}, "guidance_scale": 5.0}
    whole = dict.fromkeys(("row", "index", "steps", "height", "width", "seed"), 1)
    return [
        Entry(
            png(n),
            {"number": n, "id": str(n), "prompt": WORDS[n % len(WORDS)], **texts, **whole, "extra": {}},
        )
        for n in numbers
    ]


def as_shards(format: str):
    def lay(folder: pathlib.Path, count: int) -> None:
        folder.mkdir()
        half = count // 2
        write_shard(folder, "000000", format, entries(range(half)))
        write_shard(folder, "000001", format, entries(range(half, count)))

    return lay


def with_sidecars(suffix: str):
    def lay(folder: pathlib.Path, count: int) -> None:
        for n in range(count):
            text = WORDS[n % len(WORDS)]
            told = json.dumps({"text": text}) if suffix == "json" else f"\ufeff {text}\n"
            write(folder, {f"{n // 3}/{n:03}.png": plain_png(n), f"{n // 3}/{n:03}.{suffix}": told})

    return lay


def plain_png(number: int) -> bytes:
    data = io.BytesIO()
    picture(number).save(data, "PNG")
    return data.getvalue()


def with_metadata(folder: pathlib.Path, count: int) -> None:
    rows = [{"file_name": f"p/{n:03}.png", "text": WORDS[n % len(WORDS)]} for n in reversed(range(count))]
    write(folder, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    write(folder, {f"p/{n:03}.png": plain_png(n) for n in range(count)})


LAYOUTS = {
    "txt": with_sidecars("txt"),
    "json": with_sidecars("json"),
    "metadata": with_metadata,
    "files": as_shards("files"),
    "webdataset": as_shards("webdataset"),
    "arrayrecord": as_shards("arrayrecord"),
    "parquet": as_shards("parquet"),
}


def made(path: pathlib.Path, workdir: pathlib.Path, batch_size: int = 2, **options) -> PictureBatches:
    config = DataConfig(paths=(str(path),), workers=2, **{"buckets": 3, "multiple": 8, **options})
    config.validate()
    return PictureBatches(config, batch_size, SIZE, Skipped(workdir / "skipped.jsonl"))


def listed(workdir: pathlib.Path) -> list[tuple[str, str]]:
    file = workdir / "skipped.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(row["file"], row["reason"]) for row in map(json.loads, lines)]


def assert_same(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for (images, captions, sizes, _), (others, texts, crops, _) in zip(ours, theirs, strict=True):
        assert captions == texts
        assert images.shape == others.shape and (images == others).all()
        assert (sizes == crops).all()


def rows(batches: PictureBatches, steps: range, batch_size: int = 2) -> list:
    return [batches.rows(step, 0, batch_size) for step in steps]


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def noisy(format: str) -> bytes:
    rng = np.random.default_rng(0)
    return saved(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), format)


GOOD = {"good.png": plain_png(0), "good.txt": "a fox", "good2.png": plain_png(1), "good2.txt": "a hill"}
