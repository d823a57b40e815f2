"""Pictures from folders, tars, ArrayRecord and Parquet: the same batches, whatever the way and the stops."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from engine import finish
from engine.config import DataConfig
from engine.errors import UserError
from engine.text.tokenizer import Tokenizer
from engine.train.sources import training_batches
from engine.train.sources.batches import PictureBatches
from engine.train.sources.item import required
from engine.train.sources.skipped import Skipped
from tests.train.laid_out import (
    GOOD,
    LAYOUTS,
    SIZE,
    WORDS,
    assert_same,
    listed,
    made,
    picture,
    plain_png,
    rows,
    write,
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    LAYOUTS["txt"](folder / "data", 14)
    return rows(made(folder / "data", folder, crop="random", flip=0.5), range(20))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_gives_the_same_batches(layout, tmp_path, expected):
    LAYOUTS[layout](tmp_path / "data", 14)
    batches = made(tmp_path / "data", tmp_path, crop="random", flip=0.5)
    assert batches.usable == 14 and listed(tmp_path) == []
    assert_same(rows(batches, range(20)), expected)


def test_batches_hold_all_pictures_in_their_shapes(expected):
    shapes = {images.shape for images, *_ in expected}
    assert len(shapes) == 3 and all(len(images) == 2 for images, *_ in expected)
    assert {caption for _, captions, *_ in expected for caption in captions} == set(WORDS)


def test_a_resumed_run_sees_what_the_uninterrupted_one_does(tmp_path, expected):
    LAYOUTS["txt"](tmp_path / "data", 14)
    batches = made(tmp_path / "data", tmp_path, crop="random", flip=0.5)
    assert_same(rows(batches, range(11, 20)), expected[11:])
    assert_same(rows(batches, range(19, -1, -1)), expected[::-1])


def test_hosts_share_each_batch(tmp_path, tokenizer, capsys):
    LAYOUTS["webdataset"](tmp_path / "data", 14)
    config = DataConfig(paths=(str(tmp_path / "data"),), buckets=3, multiple=8, workers=2, crop="random")

    def host(process: int, processes: int):
        return training_batches(
            config,
            4,
            tokenizer,
            size=SIZE,
            workdir=tmp_path,
            process=process,
            processes=processes,
            keep_tags=0,
        )

    alone, first, second = host(0, 1), host(0, 2), host(1, 2)
    assert capsys.readouterr().out.count("data: 14 pictures") == 2  # not of the second host
    for step in range(9):
        whole, halves = alone(step), (first(step), second(step))
        for name in ("image", "ids"):
            assert (whole[name] == np.concatenate([half[name] for half in halves])).all()
        assert whole["image"].dtype == np.uint8 and whole["ids"].dtype == np.int32
    with pytest.raises(UserError, match="batch_size=4: write a multiple of the 3 processes"):
        host(0, 3)


def test_repeats_count_in_an_epoch(tmp_path):
    for part, numbers in (("a", range(2)), ("b", range(2, 4))):
        for n in numbers:
            write(tmp_path / part, {f"{n}.png": plain_png(n), f"{n}.txt": str(n)})
    config = DataConfig(paths=(str(tmp_path / "a"), str(tmp_path / "b")), repeats=(1, 3), workers=1)
    batches = PictureBatches(config, 8, SIZE, Skipped(tmp_path / "skipped.jsonl"))
    assert sorted(batches.rows(5, 0, 8)[1]) == [*"01222333"]


def test_flips_and_crops_follow_from_picture_and_round(tmp_path):
    write(tmp_path / "data", {"0.png": plain_png(3), "0.txt": "a"})  # 64 x 20
    kinds = {}
    for crop, flip in (("center", 0.0), ("center", 1.0), ("random", 0.0)):
        batches = made(tmp_path / "data", tmp_path, 8, buckets=1, crop=crop, flip=flip)
        kinds[crop, flip], again = (batches.rows(1, 0, 8)[0] for _ in range(2))
        assert (again == kinds[crop, flip]).all()
    whole, mirrored, random = kinds.values()
    assert (whole == whole[:1]).all() and (mirrored == whole[:, :, ::-1]).all()
    assert len({image.tobytes() for image in random}) == 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from engine.text.tokenizer import train_tokenizer

    return train_tokenizer(WORDS, 600, 16, [])


def test_caption_field(tmp_path):
    row = {"text": "short", "long": "a long caption"}
    files = {"0.png": plain_png(0), "0.txt": "of the file", "0.json": json.dumps(row)}
    folder = write(tmp_path / "data", files)
    for field, caption in (("", "of the file"), ("text", "short"), ("long", "a long caption")):
        assert made(folder, tmp_path, caption_field=field).rows(0, 0, 1)[1] == [caption]


def test_what_shows_pictures_is_none_of_them(tmp_path):
    """A strip and a sheet of words beside a picture, as launch.generate leaves them: told, and left out."""
    files = {"0.png": plain_png(0), "0.txt": "a fox"}
    for i, beside in enumerate(({}, {"frames": 2}, {"words": True}, {"sheet": ["a.png"]}), start=1):
        files[f"{i}.png"] = finish.encode_png(np.asarray(picture(i)), {"prompt": "a car", **beside})
    found = made(write(tmp_path / "data", files), tmp_path)
    assert sorted(found.rows(0, 0, 2)[1]) == ["a car", "a fox"]
    skipped = listed(tmp_path)
    assert [pathlib.Path(file).name for file, _ in skipped] == ["2.png", "3.png", "4.png"]
    assert {reason for _, reason in skipped} == {"a strip or a sheet that launch.generate made of pictures"}


def test_mistakes_are_told(tmp_path):
    write(tmp_path, {"mixed/a.png": b"", "mixed/b.tar": b"", "none/notes.md": "", "one.png": plain_png(0)})
    for path, kind, message in [
        ("lost", "auto", "lost: no such folder or file; write a folder of pictures, or shards"),
        ("mixed", "auto", "mixed holds files and webdataset: write data.kind='files' or 'webdataset'"),
        ("none", "auto", "none: no pictures; write a folder"),
        ("none", "parquet", "none: no parquet; write a folder"),
        ("one.png", "auto", "one.png is one picture: write the folder that it lies in"),
    ]:
        with pytest.raises(UserError, match=message):
            made(tmp_path / path, tmp_path, kind=kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "webdatset"}, "data.kind='webdatset' is unknown .did you mean webdataset.?.; write auto, "),
        ({"crop": "middle"}, "data.crop='middle' is unknown; write center, random"),
        ({"paths": "pictures"}, "data.paths='pictures': write a tuple, such as"),
        ({"paths": ("",)}, "write a tuple, such as"),
        ({"kind": "scenes"}, "data.kind='scenes' is unknown; write auto, "),
        ({"paths": ("a",), "kind": "world"}, "data.kind='world' draws its pictures: leave out data.paths"),
        ({"paths": ("a",), "tellers": 2}, "data.paths are other pictures: write data.tellers=0"),
        ({"kind": "parquet"}, "data.kind='parquet' without pictures: write data.paths too"),
        ({"flip": 1.5}, "data.flip=1.5 is out of range; write 0 to 1"),
        ({"flip": float("nan")}, "data.flip=nan is out of range; write 0 to 1"),
        ({"workers": 0}, "data.workers=0 is out of range; write 1 to 256"),
        ({"repeats": (1, 2)}, "data.repeats=.1, 2.: write a number from 1 to 1000, or one for each path"),
        ({"repeats": (0,)}, "data.repeats=.0,.: write a number from 1"),
        ({"buckets": 5, "size": 500}, "data.size=500: write a multiple of data.multiple=64"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(UserError, match=message) as error:
        config = DataConfig()
        vars(config).update(options)  # as flags do, whatever the types
        config.validate()
    assert "\n" not in str(error.value)


def test_other_data_than_before_is_told(tmp_path, capsys):
    write(tmp_path / "data", GOOD)
    config = DataConfig(paths=(str(tmp_path / "data"),))

    def begin(config: DataConfig) -> str:
        training_batches(config, 2, None, size=SIZE, workdir=tmp_path / "run")
        return capsys.readouterr().out

    assert "changed" not in begin(config) + begin(config)
    write(tmp_path / "data", {"good.txt": "a wolf"})
    assert "data: changed since this run began" in begin(config)
    larger = Image.open(tmp_path / "data" / "good.png")
    larger.putpixel((0, 0), (1, 2, 3))
    larger.save(tmp_path / "data" / "good.png", compress_level=1)  # retouched: as large as before
    assert "data: changed since this run began" in begin(config)
    assert "changed" not in begin(config)
    assert "data: changed since this run began" in begin(dataclasses.replace(config, seed=1))


def test_captions_that_are_empty_or_missing_are_for_who_reads_them_to_judge(tmp_path):
    """Textual inversion needs none; in capital letters they are captions all the same."""
    files = {f"{name}.png": plain_png(i) for i, name in enumerate("abc")} | {"a.txt": " ", "c.TXT": "a fox"}
    write(tmp_path / "data", files)
    write(tmp_path / "rows", {"d.png": plain_png(3), "metadata.jsonl": '{"file_name": "d.png"}'})
    config = DataConfig(paths=(str(tmp_path / "data"), str(tmp_path / "rows")))
    for name, accept, usable in (("all", lambda caption: caption or "", 4), ("told", required, 1)):
        run = tmp_path / name
        training_batches(config, 1, None, size=SIZE, workdir=run, accept=accept)
        file = run / "skipped.jsonl"
        skipped = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        assert len(skipped) == 4 - usable and all(each["reason"] == "no caption" for each in skipped)


def test_categories_and_views_of_parquet_are_texts(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = pa.array(["a fox", "a hill"])
    for name, column in (("kinds", texts.dictionary_encode()), ("views", texts.cast(pa.string_view()))):
        table = pa.table({"image": [plain_png(0), plain_png(1)], "caption": column})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        config = DataConfig(paths=(str(tmp_path / f"{name}.parquet"),))
        batches = PictureBatches(config, 2, SIZE, Skipped(tmp_path / f"{name}.jsonl"))
        assert (batches.usable, batches.skipped) == (2, 0)


def test_the_list_survives_a_kill(tmp_path):
    file = tmp_path / "skipped.jsonl"
    Skipped(file).add("a", "x")
    file.write_bytes(file.read_bytes() + b'{"file": "b", "rea')
    again = Skipped(file)
    for name in "abb":
        again.add(name, "x")
    assert listed(tmp_path) == [("a", "x"), ("b", "x")]
