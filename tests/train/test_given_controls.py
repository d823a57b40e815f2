"""A ControlNet that is trained on pictures given beside the others: found in every layout, cropped alike,
shown as they are."""

import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from engine import sights
from engine.config import ControlConfig, DataConfig, PriorConfig, SamplesConfig
from engine.train import finetune
from engine.train.sources.batches import PictureBatches
from engine.train.sources.skipped import Skipped
from engine.types import UserError
from engine.weights.controlnet import kind_of
from tests.train.laid_out import SIZES, WORDS, listed, picture, plain_png, write

GIVEN, COUNT, SIZE = ControlConfig(kind="given"), 7, 16


def control(number: int, scale: int = 1) -> bytes:
    """The negative of a picture, `scale` times as large."""
    image = Image.fromarray(255 - np.asarray(picture(number)))
    data = io.BytesIO()
    image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST).save(data, "PNG")
    return data.getvalue()


def as_metadata(folder):
    rows = [
        {"file_name": f"p/{n}.png", "text": WORDS[n], "conditioning_image": f"shown/{n}.png"}
        for n in range(COUNT)
    ]
    write(folder, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    write(folder, {f"p/{n}.png": plain_png(n) for n in range(COUNT)})
    write(folder, {f"shown/{n}.png": control(n) for n in range(COUNT)})


def as_hugging_face_has_it(folder):
    as_metadata(folder)
    told = (folder / "metadata.jsonl").read_text()
    write(folder, {"metadata.jsonl": told.replace('"conditioning_image"', '"conditioning_image_file_name"')})


def beside(n):
    return {f"{n}.png": plain_png(n), f"{n}.txt": WORDS[n].encode(), f"{n}.control.png": control(n)}


def as_sidecars(folder):
    for n in range(COUNT):
        write(folder, beside(n))


def as_webdataset(folder):
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for n in range(COUNT):
            for name, data in beside(n).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def as_parquet(folder):
    folder.mkdir()
    rows = {
        "image": [{"bytes": plain_png(n), "path": ""} for n in range(COUNT)],
        "text": WORDS[:COUNT],
        "conditioning_image": [control(n) for n in range(COUNT)],
    }
    pa.parquet.write_table(pa.table(rows), folder / "0.parquet")


LAYOUTS = {
    "metadata": as_metadata,
    "Hugging Face": as_hugging_face_has_it,
    "sidecars": as_sidecars,
    "tar": as_webdataset,
    "parquet": as_parquet,
}


def made(folder, workdir, controlled=True, **options) -> PictureBatches:
    own = DataConfig(paths=(str(folder),), workers=2, **{"buckets": 3, "multiple": 8} | options)
    return PictureBatches(own, 2, SIZE, Skipped(workdir / "skipped.jsonl"), controlled=controlled)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_comes_with_its_own_cropped_and_mirrored_alike(tmp_path, layout):
    LAYOUTS[layout](tmp_path / "data")
    batches = made(tmp_path / "data", tmp_path, crop="random", flip=0.5)
    assert (batches.usable, batches.skipped) == (COUNT, 0)  # what is shown is no picture of its own
    for step in range(12):
        found = batches.rows(step, 0, 2)
        assert found.controls.shape == found.images.shape
        assert np.abs(found.controls.astype(int) + found.images - 255).max() <= 2  # rounding


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_nothing_is_shown_all_is_as_without(tmp_path, layout):
    LAYOUTS[layout](tmp_path / "data")
    batches = made(tmp_path / "data", tmp_path, controlled=False)
    assert (batches.usable, batches.rows(0, 0, 2).controls) == (COUNT, None)
    # as ever: what lies in a folder is a picture, and one without a caption
    assert batches.skipped == (COUNT if layout in ("metadata", "Hugging Face", "sidecars") else 0)
    assert {reason for _, reason in listed(tmp_path)} <= {"no caption"}


def test_other_sizes_of_what_is_shown_are_other_data(tmp_path):
    as_sidecars(tmp_path / "data")
    before = made(tmp_path / "data", tmp_path).fingerprint
    write(tmp_path / "data", {"3.control.png": control(3, 2)})
    assert made(tmp_path / "data", tmp_path).fingerprint != before


@pytest.mark.parametrize("name", ["3.CONTROL.PNG", "3.Control.png"])
def test_letters_of_any_size(tmp_path, name):
    as_sidecars(tmp_path / "data")
    (tmp_path / "data" / "3.control.png").rename(tmp_path / "data" / name)
    batches = made(tmp_path / "data", tmp_path)
    assert (batches.usable, batches.skipped) == (COUNT, 0)


def test_a_larger_one_of_the_same_proportions_will_do(tmp_path):
    for n in range(COUNT):
        write(tmp_path / "data", beside(n) | {f"{n}.control.png": control(n, 3)})
    found = made(tmp_path / "data", tmp_path, buckets=1).rows(0, 0, 2)
    assert np.abs(found.controls.astype(int) + found.images - 255).mean() < 40


def test_what_cannot_be_shown_is_skipped_and_listed(tmp_path):
    folder = tmp_path / "data"
    as_metadata(folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    del lines[0]["conditioning_image"]
    lines[1]["conditioning_image"] = "../outside.png"
    lines[2]["conditioning_image"] = "shown/none.png"
    lines[3]["conditioning_image"] = "shown/4.png"
    lines[5]["conditioning_image"] = 7
    write(folder, {"metadata.jsonl": "\n".join(map(json.dumps, lines)), "shown/6.png": b"no picture"})
    batches = made(folder, tmp_path)
    assert batches.usable == 1 and batches.rows(0, 0, 1).captions == [WORDS[4]]
    why = {name.rpartition("/p/")[2]: reason for name, reason in listed(tmp_path)}
    assert SIZES[3] != SIZES[4]
    assert why["0.png"].startswith("no control picture: a row names it as conditioning_image, or 1.control")
    assert why["1.png"].startswith("its control picture: conditioning_image ")
    assert why["2.png"] == "its control picture: No such file or directory"
    assert why["3.png"] == ("64 x 20 pixels, and its control picture 33 x 31: they need the same proportions")
    assert why["5.png"] == "its control picture: no conditioning_image"
    assert why["6.png"].startswith("its control picture: damaged")


def test_one_that_is_damaged_inside_is_stood_in_for(tmp_path):
    as_sidecars(tmp_path / "data")
    whole = control(2)
    write(tmp_path / "data", {"2.control.png": whole[: len(whole) // 2]})
    batches = made(tmp_path / "data", tmp_path)
    assert batches.usable == COUNT
    shown = {caption for step in range(12) for caption in batches.rows(step, 0, 2).captions}
    assert shown == {*WORDS} - {WORDS[2]}
    ((name, reason),) = listed(tmp_path)
    assert name.endswith("2.png") and reason.startswith("its control picture: damaged")


def test_a_table_without_the_column_is_one_line(tmp_path):
    as_parquet(tmp_path / "data")
    table = pa.parquet.read_table(tmp_path / "data" / "0.parquet").drop_columns("conditioning_image")
    pa.parquet.write_table(table, tmp_path / "data" / "0.parquet")
    with pytest.raises(
        UserError, match=r"no column 'conditioning_image' of bytes; its columns are image, text"
    ):
        made(tmp_path / "data", tmp_path)


@pytest.fixture
def mosaics(pictures, tmp_path):
    """The pictures of the configs again, with their mosaics beside them."""
    folder = tmp_path / "mosaics"
    for file in pictures.iterdir():
        write(folder, {file.name: file.read_bytes()})
        if file.suffix == ".png":
            pixels = np.asarray(Image.open(file).convert("RGB"))
            Image.fromarray(sights.seen("mosaic", pixels)).save(folder / f"{file.stem}.control.png")
    return folder


def test_given_mosaics_train_as_those_that_it_makes(config, mosaics, tmp_path):
    """The same gradients: what is shown is the same."""
    found = []
    for kind in ("mosaic", "given"):
        own = config("controlnet", controlnet=ControlConfig(kind=kind))
        own.data.paths = own.data.paths if kind == "mosaic" else (str(mosaics),)
        task = finetune.begin(own)
        aim, key = finetune.objective(own, task), jax.random.key(0, impl="threefry2x32")
        batch = jax.tree.map(jnp.asarray, finetune.batches(own, task, tmp_path / kind)(0))
        gradient = jax.jit(jax.grad(lambda params, batch: aim.loss(params, aim.frozen, batch, key)[0]))  # noqa: B023
        found.append(jax.tree.leaves(gradient(task.params, batch)))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(np.abs(leaf).max() for leaf in found[0]) > 0
    given = finetune.export(task, task.params, tmp_path / "net", overwrite=False)
    assert kind_of(given) == ""  # of one that is shown what it makes: test_controlnet.py
    assert "_control_kind" not in json.loads((given / "config.json").read_text())


def test_another_picture_beside_them_is_another_loss(config, mosaics, tmp_path):
    own = config("controlnet", controlnet=GIVEN)
    own.data.paths = (str(mosaics),)
    task = finetune.begin(own)
    batch = jax.tree.map(jnp.asarray, finetune.batches(own, task, tmp_path)(0))
    aim = finetune.objective(own, task)
    params = jax.tree.map(lambda p: p + 0.05, task.params)
    key = jax.random.key(0, impl="threefry2x32")
    losses = [
        float(aim.loss(params, aim.frozen, each, key)[0])
        for each in (batch, {**batch, "control": 255 - batch["control"]})
    ]
    assert losses[0] != losses[1]


def test_samples_show_their_pictures_as_they_are(config, mosaics, tmp_path):
    files = tuple(str(mosaics / f"{colour}-above.png") for colour in ("red", "blue"))
    samples = SamplesConfig(prompts=("a red car", "a blue car"), every=1, steps=2, images=files)
    own = config("controlnet", controlnet=GIVEN, samples=samples, steps=1)
    own.data.paths = (str(mosaics),)
    finetune.train(own, tmp_path / "run")
    (sheet,) = (tmp_path / "run" / "samples").glob("*.png")
    colours = {tuple(c) for c in np.asarray(Image.open(sheet).convert("RGB")).reshape(-1, 3)}
    assert {tuple(c) for c in np.asarray(Image.open(files[0]).convert("RGB")).reshape(-1, 3)} <= colours


def test_a_prior_has_none(config):
    with pytest.raises(
        UserError, match=r"prior.num_images with controlnet.kind='given': .*write prior.num_images=0"
    ):
        config("controlnet", controlnet=GIVEN, prior=PriorConfig("a car", 4)).validate()
