"""What cannot be used is skipped and listed, whatever is wrong with it, and the rest is trained on."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine.errors import UserError
from engine.jobs.formats import write_shard
from tests.train.laid_out import (
    GOOD,
    assert_same,
    entries,
    listed,
    made,
    noisy,
    picture,
    plain_png,
    png,
    rows,
    saved,
    write,
)

ROOT = pathlib.Path(__file__).parents[2]


def bomb() -> bytes:
    """The header of a PNG of 30000 x 30000 pixels."""
    data = bytearray(saved(Image.new("1", (8, 8))))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


AT_FIRST_LOOK = {
    "empty.png": (b"", "an empty file"),
    "text.png": (b"a picture of a fox", "damaged, or none of PNG, JPEG, WEBP"),
    "gif.png": (saved(Image.new("L", (9, 9)), "GIF"), "damaged, or none of PNG, JPEG, WEBP"),
    "header.png": (noisy("PNG")[:20], "damaged"),
    "header.jpg": (noisy("JPEG")[:30], "damaged"),
    "half.webp": (noisy("WEBP")[:1500], "damaged"),
    "bomb.png": (bomb(), "too large"),
    "wide.png": (saved(Image.new("1", (16000, 5000))), "16000 x 5000 pixels: too large"),
    "small.png": (saved(Image.new("L", (9, 9))), "9 x 9 pixels: less than min_size=10"),
}
WHEN_DECODED = {
    "half.png": (noisy("PNG")[:3000], "damaged: "),
    "half.jpg": (noisy("JPEG")[:1500], "damaged: "),
    "changed.png": (noisy("PNG")[:200] + b"x" * 99 + noisy("PNG")[299:], "damaged: "),
}
CAPTIONS = {
    "none.png": (None, None, "no caption"),
    "blank.png": ("txt", b" \n", "no caption"),
    "void.png": ("txt", b"", "no caption"),
    "latin.png": ("txt", "grün".encode("latin-1"), "the caption is not UTF-8"),
    "utf16.png": ("txt", "a fox".encode("utf-16"), "the caption is not UTF-8"),
    "long.png": ("txt", b"fox " * 50_000, "a caption of more than 128 KiB"),
    "huge.png": ("txt", b"fox " * 500_000, "a caption file of more than 1 MiB"),
    "list.png": ("json", b"[1]", "the caption's JSON is no object"),
    "broken.png": ("json", b'{"caption": "a', "the caption's JSON is damaged"),
    "deep.png": ("json", b"[" * 100_000, "the caption's JSON is damaged"),
    "number.png": ("json", b'{"text": 5}', "the caption is no text"),
    "other.png": ("json", b'{"title": "a fox"}', "no caption"),
    "half pair.png": ("json", b'{"text": "a \\ud800"}', "the caption is not valid Unicode"),
    "latin json.png": ("json", '{"text": "ü"}'.encode("latin-1"), "the caption is not UTF-8"),
}


def test_what_cannot_be_used_is_skipped_and_listed(tmp_path):
    folder = write(tmp_path / "data", GOOD)
    for name, (data, _) in (AT_FIRST_LOOK | WHEN_DECODED).items():
        folder = write(folder, {name: data, f"{pathlib.Path(name).stem}.txt": "a"})
    for name, (suffix, text, _) in CAPTIONS.items():
        write(folder, {name: plain_png(2)})
        if suffix:
            write(folder, {f"{pathlib.Path(name).stem}.{suffix}": text})
    os.mkfifo(folder / "pipe.png")
    write(folder, {"pipe.txt": "a", "folder.png/notes.md": "", ".hidden.png": b""})

    batches = made(folder, tmp_path, 2, buckets=1, min_size=10)
    reasons = {name: told[-1] for name, told in (AT_FIRST_LOOK | CAPTIONS).items()} | {"pipe.png": "no file"}
    found = dict(listed(tmp_path))
    assert {os.path.basename(name) for name in found} == set(reasons)
    for name, reason in found.items():
        assert os.path.dirname(name) == str(folder)
        assert reason.startswith(reasons[os.path.basename(name)]), name
    assert batches.usable == 2 + len(WHEN_DECODED) and batches.skipped == len(reasons)
    assert "see skipped.jsonl" in batches.summary()

    shown = {caption for _, captions, *_ in rows(batches, range(20)) for caption in captions}
    assert shown == {"a fox", "a hill"}
    later = listed(tmp_path)[len(found) :]
    assert sorted(os.path.basename(name) for name, _ in later) == sorted(WHEN_DECODED)
    for name, reason in later:
        assert reason.startswith(WHEN_DECODED[os.path.basename(name)][1])

    again = made(folder, tmp_path, 2, buckets=1, min_size=10)
    assert_same(rows(again, range(13, 20)), rows(batches, range(13, 20)))  # those that stand in are the same
    assert listed(tmp_path) == [*found.items(), *later]  # and nothing is listed twice


def test_damage_is_replaced_from_the_same_host(tmp_path):
    """Every second picture is damaged; what two hosts show of a round has nothing in common."""
    for n in range(16):
        data = noisy("PNG")[:3000] if n % 2 else plain_png(2)
        write(tmp_path / "data", {f"{n:02}.png": data, f"{n:02}.txt": str(n)})
    batches = made(tmp_path / "data", tmp_path, 4, buckets=1)
    shown = [[batches.rows(step, 2 * host, 2)[1] for step in range(4)] for host in range(2)]
    first, second = ({caption for captions in host for caption in captions} for host in shown)
    assert all(int(caption) % 2 == 0 for caption in first | second)
    assert len(listed(tmp_path)) == 8


def test_a_bucket_of_nothing_but_damage_shows_other_pictures_in_its_shape(tmp_path):
    write(
        tmp_path / "data", {"0.png": noisy("PNG")[:3000], "0.txt": "a", "1.png": plain_png(3), "1.txt": "b"}
    )
    batches = made(tmp_path / "data", tmp_path, 2)
    shown = rows(batches, range(6))
    assert {images.shape for images, *_ in shown} == {(2, 16, 16, 3), (2, 8, 24, 3)}
    assert {caption for _, captions, *_ in shown for caption in captions} == {"b"}


def test_nothing_but_damage_is_a_mistake(tmp_path):
    write(tmp_path / "data", {"0.png": noisy("PNG")[:3000], "0.txt": "a"})
    with pytest.raises(UserError, match="no picture can be decoded; skipped"):
        made(tmp_path / "data", tmp_path).rows(0, 0, 2)
    write(tmp_path / "data", {"0.png": b""})
    with pytest.raises(UserError, match="no picture can be used; skipped"):
        made(tmp_path / "data", tmp_path)


def test_metadata_names_no_files_elsewhere(tmp_path):
    folder = write(tmp_path / "data", {"good.png": plain_png(0), "sub/in.png": plain_png(1)})
    write(tmp_path, {"secret.png": plain_png(2), "secrets/a.png": plain_png(2)})
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "links").symlink_to(tmp_path / "secrets")
    outside = {
        "../secret.png": "file_name leads out of the folder",
        "sub/../../secret.png": "file_name leads out of the folder",
        "link.png": "file_name leads out of the folder",
        "links/a.png": "file_name leads out of the folder",
        str(folder / "good.png"): "file_name is an absolute path",
        "C:\\secret.png": "file_name is an absolute path",
        "a\0b.png": "file_name is no path",
        "lost.png": "No such file or directory",
        "sub": "no file",
        "": "no file_name",
    }
    rows_of = [json.dumps({"file_name": name, "text": "a"}) for name in outside]
    rows_of += ["{", '{"file_name": 5}', '{"file_name": "sub/../good.png", "text": "a fox"}']
    rows_of += ['{"file_name": "sub/in.png", "text": " "}']
    write(folder, {"metadata.jsonl": "\n".join(rows_of)})
    batches = made(folder, tmp_path)
    assert batches.usable == 1 and batches.rows(0, 0, 2)[1] == ["a fox"] * 2
    found = [reason for _, reason in listed(tmp_path)]
    wanted = [*outside.values(), "invalid JSON", "no file_name", "no caption"]
    wanted += ["no caption"]  # link.png, as a file of the folder
    wanted += ["a link to a folder is not followed"]  # links
    assert sorted(reason.split(";")[0].split(":")[0] for reason in found) == sorted(wanted)


def tar_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_tars_of_others(tmp_path):
    files = {
        "a/0.jpg": saved(picture(0), "JPEG"),
        "a/0.txt": b"a fox",
        "a/1.PNG": plain_png(1),
        "a/1.seg.png": plain_png(1),
        "a/1.json": b'{"caption": "a hill"}',
        "b/0.png": plain_png(2),
        "b/1.txt": b"without a picture",
        "a/2.seg.png": plain_png(2),
        "a/3.png": b"",
        "a/3.txt": b"a",
    }
    write(tmp_path, {"x.tar": tar_of(files)})
    batches = made(tmp_path / "x.tar", tmp_path)
    assert {c for _, captions, *_ in rows(batches, range(9)) for c in captions} == {"a fox", "a hill"}
    assert listed(tmp_path) == [
        (f"{tmp_path}/x.tar/b/0.png", "no caption"),
        (f"{tmp_path}/x.tar/a/2.seg.png", "a dot in its name: in a tar it is the seg.png of another"),
        (f"{tmp_path}/x.tar/a/3.png", "an empty file"),
    ]


@pytest.mark.parametrize("format", ["webdataset", "arrayrecord", "parquet"])
@pytest.mark.parametrize("harm", ["empty", "text", "cut"])
def test_damaged_shards_are_skipped_and_listed(harm, format, tmp_path):
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data", "000000", format, entries(range(4)))
    broken = write_shard(tmp_path / "data", "000001", format, entries(range(4, 8)))
    whole = broken.read_bytes()
    broken.write_bytes(
        {"empty": b"", "text": b"no shard at all " * 99, "cut": whole[: len(whole) // 2]}[harm]
    )
    batches = made(tmp_path / "data", tmp_path)
    assert 4 <= batches.usable < 8
    rows(batches, range(9))
    assert str(broken) in {name for name, _ in listed(tmp_path)}


def test_a_damaged_header_in_a_tar_is_no_end(tmp_path):
    (tmp_path / "data").mkdir()
    shard = write_shard(tmp_path / "data", "0", "webdataset", entries(range(4)))
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        place = tar.getmember("00000002.png").offset
    data[place + 5] ^= 1
    shard.write_bytes(data)
    assert made(shard, tmp_path).usable == 2
    assert listed(tmp_path) == [(str(shard), f"damaged or cut off at byte {place}: what follows is lost")]


def test_a_changed_record_is_skipped(tmp_path):
    (tmp_path / "data").mkdir()
    shard = write_shard(tmp_path / "data", "0", "arrayrecord", entries(range(4)))
    data = bytearray(shard.read_bytes())
    place = data.index(png(2)) + 1000
    data[place] ^= 1
    shard.write_bytes(data)
    batches = made(shard, tmp_path)
    rows(batches, range(9))
    ((name, reason),) = listed(tmp_path)
    assert name == f"{shard}/2" and reason.startswith("a damaged record")


def test_parquet_of_others(tmp_path):
    texts = pa.array([b"a fox", b"\xff\xfe", None, b"a hill", b"x"], pa.binary()).cast(
        pa.string(), safe=False
    )
    images = [plain_png(0), plain_png(1), plain_png(2), plain_png(3), None]
    pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / "x.parquet")
    batches = made(tmp_path / "x.parquet", tmp_path)
    assert {c for _, captions, *_ in rows(batches, range(9)) for c in captions} == {"a fox", "a hill"}
    assert [(pathlib.Path(name).name, reason) for name, reason in listed(tmp_path)] == [
        ("1", "the caption is not UTF-8"),
        ("2", "no caption"),
        ("4", "no picture"),
    ]
    with pytest.raises(UserError, match="no column 'title'; its columns are image, text"):
        made(tmp_path / "x.parquet", tmp_path, caption_field="title")
    pq.write_table(pa.table({"pictures": images}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="no column 'image' of bytes; its columns are pictures"):
        made(tmp_path / "y.parquet", tmp_path)


def test_the_copy_of_parquet_goes_with_the_program(tmp_path):
    """The program ends without looking for what is in cycles, as a run's data are."""
    pq.write_table(pa.table({"image": [plain_png(0)], "text": ["a fox"]}), tmp_path / "x.parquet")
    (tmp_path / "temporary").mkdir()
    code = (
        "import os; from launch import cli; from engine.train.sources.tables import Tables\n"
        "def job(argv):\n"
        f"    tables = Tables([{str(tmp_path / 'x.parquet')!r}])\n"
        "    tables.cycle = tables\n"
        "    return len(os.listdir(os.environ['TMPDIR'])) - 1\n"
        "cli.main(job)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert not list((tmp_path / "temporary").iterdir())
