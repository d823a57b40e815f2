"""Shards: the same pictures in every format, by the readers that people use; damage that is noticed."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from engine import finish
from engine.config import FORMATS
from engine.errors import UserError
from engine.jobs import formats, report
from engine.jobs.store import open_store
from tests.test_finish_disks import largest_file

IN_ONE_FILE = [format for format in FORMATS if format != "files"]
HOSTILE = [
    "../../etc/passwd",
    "/absolute",
    "..",
    "a\nline\tand a \0 NUL",
    "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe \N{PILE OF POO}",
    "-rf *; $(reboot) `x` | & > < ' \"",
    "CON.png/..\\..\\x:y",
    "long " * 1000,
    "",
]
DAMAGES = 60  # of each kind and format


def entry(number, prompt="a red fox", **facts):
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    png = finish.encode_png(pixels, {"prompt": prompt, "index": number})
    facts = {
        "number": number,
        "id": f"row {number}",
        "row": number,
        "prompt": prompt,
        "negative_prompt": "",
        "seed": 2**64 - 1,
        "index": number,
        "guidance_scale": 7.5,
        "steps": 20,
        "sampler": "ddim",
        "height": 16,
        "width": 16,
        "sha256": hashlib.sha256(png).hexdigest(),
        "extra": {"note": "carried", "lone": "\ud800"},
        **facts,
    }
    return formats.Entry(png, facts)


# In the order of a shard, where neither prompts nor numbers as texts are sorted.
ENTRIES = [
    entry(99_999_998 + i, prompt, id=prompt)
    for i, prompt in enumerate(["b", "a", "c", *HOSTILE, "a red fox"])
]
PNGS = [one.png for one in ENTRIES]
MANY = [entry(number) for number in range(2 * formats.ROWS_AT_ONCE + 3)]


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def publish(store):
    """Puts a shard in its place and gives its path."""

    def publish(format, entries=ENTRIES):
        path = formats.write_shard(store.spool(), "000012", format, entries)
        store.publish(path, formats.path_of(format, "000012"))
        return store.url + "/" + formats.path_of(format, "000012")

    return publish


def contents(path):
    """name -> bytes, of a file or a folder of files."""
    return {part.name: part.read_bytes() for part in (path.iterdir() if path.is_dir() else [path])}


@pytest.mark.parametrize("format", FORMATS)
def test_pictures_come_back_in_order(store, publish, format):
    publish(format)
    assert list(formats.read_pngs(store, format, "000012")) == PNGS


@pytest.mark.parametrize("format", FORMATS)
def test_equal_pictures_give_equal_bytes(tmp_path, format):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        formats.write_shard(tmp_path / name, "000012", format, ENTRIES)
    one, two = (contents(next((tmp_path / name).iterdir())) for name in ("one", "two"))
    assert one == two and one.keys() == two.keys()


@pytest.mark.parametrize("format", FORMATS)
def test_leftovers_of_the_same_name_go(tmp_path, format):
    formats.write_shard(tmp_path, "000012", format, ENTRIES[3:])
    again = formats.write_shard(tmp_path, "000012", format, ENTRIES[:3])
    (tmp_path / "fresh").mkdir()
    fresh = formats.write_shard(tmp_path / "fresh", "000012", format, ENTRIES[:3])
    assert contents(again) == contents(fresh)


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_that_is_not_there(store, format):
    with pytest.raises(FileNotFoundError):
        list(formats.read_pngs(store, format, "000012"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_fails_while_a_shard_is_written(tmp_path, format):
    """OSError, which is tried again, whatever the library beneath raises."""
    with largest_file(900), pytest.raises(OSError):
        formats.write_shard(tmp_path, "000012", format, MANY)
    assert list(tmp_path.iterdir()), "it failed while it wrote"
    formats.write_shard(tmp_path, "000012", format, MANY)


def test_a_full_disk_is_called_so(tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        store = open_store(str(out), 0)
        for format in FORMATS:
            with pytest.raises(UserError, match=r"No space left on device.*; free some space") as error:
                store.patiently(lambda f=format: formats.write_shard(store.spool(), f, f, MANY))
            assert "\n" not in str(error.value)
            for left in (path for path in store.spool().iterdir() if path.name != ".lock"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


@pytest.mark.parametrize(
    ("format", "module"), [("arrayrecord", "array_record.python"), ("parquet", "pyarrow.parquet")]
)
def test_a_package_that_is_not_there(store, publish, monkeypatch, format, module):
    publish(format)
    formats.check_installed(format)
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"^format={format} needs a package; write pip install 'fogsculpt\[jobs\]'"
    with pytest.raises(UserError, match=message):
        formats.check_installed(format)
    with pytest.raises(UserError, match=message):
        list(formats.read_pngs(store, format, "000012"))
    for format in ("files", "webdataset"):
        formats.check_installed(format)


# ---- what people read them with


def test_names_hold_nothing_but_number_and_slug(publish, tmp_path):
    publish("files")
    names = sorted(path.name for path in (tmp_path / "out" / "shards" / "000012").iterdir())
    assert len(names) == len(ENTRIES)
    for name in names:
        number, _, rest = name.removesuffix(".png").partition("-")
        assert name.endswith(".png") and number.isdecimal() and len(name) < 80
        assert rest and set(rest) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_webdataset_reads_the_tar(publish):
    wds = pytest.importorskip("webdataset")
    samples = list(wds.WebDataset(publish("webdataset"), shardshuffle=False))
    assert [sample["png"] for sample in samples] == PNGS
    assert [sample["__key__"] for sample in samples] == [f"{one.facts['number']:08d}" for one in ENTRIES]
    assert [sample["txt"].decode() for sample in samples] == [one.facts["prompt"] for one in ENTRIES]
    assert [json.loads(sample["json"]) for sample in samples] == [one.facts for one in ENTRIES]
    for sample in samples:
        assert set(sample) == {"__key__", "__url__", "__local_path__", "png", "txt", "json"}


def test_array_record_reads_any_picture(publish):
    module = pytest.importorskip("array_record.python.array_record_module")
    reader = module.ArrayRecordReader(publish("arrayrecord"))
    assert reader.num_records() == len(PNGS)
    for place in random.Random(0).sample(range(len(PNGS)), len(PNGS)):
        assert reader.read([place]) == [PNGS[place]]
    reader.close()


def test_pyarrow_reads_the_parquet(publish):
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(publish("parquet"))
    rows = table.to_pylist()
    assert [row["image"] for row in rows] == [
        {"bytes": one.png, "path": f"{one.facts['number']:08d}.png"} for one in ENTRIES
    ]
    for row, one in zip(rows, ENTRIES, strict=True):
        assert json.loads(row.pop("extra")) == one.facts["extra"]
        del row["image"]
        assert row.pop("edit") is None, "it was made of words"
        assert row == {name: value for name, value in one.facts.items() if name != "extra"}


def test_hugging_face_would_see_pictures(publish):
    """`datasets` takes a column for pictures by its type and by what the file says of it."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    schema = pq.read_schema(publish("parquet"))
    assert schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}}


def test_many_pictures_in_row_groups(store, publish):
    pq = pytest.importorskip("pyarrow.parquet")
    path = publish("parquet", MANY)
    assert pq.ParquetFile(path).num_row_groups == 3, "so that a reader need not hold them all"
    assert list(formats.read_pngs(store, "parquet", "000012")) == [one.png for one in MANY]


# ---- damage


def cut(data, dice):
    return data[: dice.randrange(len(data))]


def flipped(data, dice):
    damaged = bytearray(data)
    for _ in range(dice.choice([1, 1, 4, 64])):
        damaged[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def flipped_at_the_end(data, dice):
    """Where Parquet has its table of contents."""
    return data[:-2000] + flipped(data[-2000:], dice)


def zeroed(data, dice):
    """As after a power cut: a block that was never written."""
    first = dice.randrange(0, len(data), 512)
    return data[:first] + bytes(len(data[first : first + 512])) + data[first + 512 :]


def without_a_middle(data, dice):
    first, last = sorted(dice.sample(range(len(data)), 2))
    return data[:first] + data[last:]


DAMAGE = [(format, damage) for format in IN_ONE_FILE for damage in (cut, flipped, zeroed, without_a_middle)]


@pytest.mark.parametrize(("format", "damage"), [*DAMAGE, ("parquet", flipped_at_the_end)])
def test_damage_is_noticed(store, publish, format, damage):
    """It is a ValueError, or a problem for --verify; never a crash."""
    path, dice = publish(format), random.Random(0)
    with open(path, "rb") as file:
        whole = file.read()
    errors = 0
    for _ in range(DAMAGES):
        with open(path, "wb") as file:
            file.write(damage(whole, dice))
        try:
            pngs = list(formats.read_pngs(store, format, "000012"))
        except ValueError as error:
            assert "000012" in str(error) and "is damaged: " in str(error) and "\n" not in str(error)
            errors += 1
            pngs = None
        if pngs is not None and (format != "webdataset" or damage is cut):
            assert pngs == PNGS, "it has checksums of its own, or an end that is marked"
        problems = report._verify_data(store, format, "000012", [one.facts for one in ENTRIES])
        assert bool(problems) == (pngs != PNGS)
    assert errors, "the damage does something"


def test_a_damaged_header_in_a_tar_is_not_its_end(store, publish):
    """For Python's own reader it is, and all behind it is silently left out."""
    path = publish("webdataset")
    with open(path, "r+b") as file:
        file.seek(file.read().index(b"%08d.png" % ENTRIES[5].facts["number"]))
        file.write(b"x")
    found = []
    with pytest.raises(ValueError, match="is damaged: bad checksum"):
        found.extend(formats.read_pngs(store, "webdataset", "000012"))
    assert len(found) <= 5


def test_other_files_are_no_shards(store):
    for format in IN_ONE_FILE:
        for data in (b"", b"no shard", ENTRIES[0].png):
            store.write(formats.path_of(format, "000012"), data)
            with pytest.raises(ValueError, match="is damaged"):
                list(formats.read_pngs(store, format, "000012"))


def test_a_network_that_fails_is_no_damage(s3, monkeypatch, tmp_path):
    told = []
    store = open_store(s3.url, 60, told.append, pause=lambda _: None)
    for format in FORMATS:
        path = formats.write_shard(store.spool(), "000012", format, ENTRIES)
        store.publish(path, formats.path_of(format, "000012"))
        s3.server.fail(3)
        told.clear()
        assert list(formats.read_pngs(store, format, "000012")) == PNGS
        assert 1 <= len(told) <= 3
        assert s3.server.faults_left == 0
    store._patience = 0
    s3.server.fail(10_000)
    with pytest.raises(UserError, match="cannot be read"):
        list(formats.read_pngs(store, "webdataset", "000012"))


def test_no_file_stays_open(store, publish):
    for format in FORMATS:
        publish(format)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert list(formats.read_pngs(store, format, "000012")) == PNGS
        assert len(os.listdir("/proc/self/fd")) == before
