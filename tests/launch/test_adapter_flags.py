"""--ip_adapter, --image_prompt and --image_encoder: runs and jobs, what pictures remember, mistakes."""

import shutil

import numpy as np
import pytest
from PIL import Image

from engine import finish
from launch import cli
from tests.adapters import picture, tiny_adapter, tiny_encoder
from tests.launch.test_bulk import facts, png_of
from tests.launch.test_edit_flags import pixels, save
from tests.launch.test_edit_jobs import failures
from tests.tiny import UNET

WIDTHS = {1: 16, 3: 16, 5: 16, 7: 32}  # of the tiny model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    tiny_encoder(folder / "image_encoder")
    words = UNET["cross_attention_dim"]
    return [
        tiny_adapter(folder / f"{way}.safetensors", WIDTHS, words, way, seed=i)
        for i, way in enumerate(("plain", "plus"))
    ]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "given").mkdir()
    return [save(tmp_path / "given" / f"{i}.png", picture(i, 40 + i, 60)) for i in range(3)]


def flags(adapters, files, *more):
    return "--ip_adapter", adapters[0], "--image_prompt", files[0], "--seed", 3, *more


def test_a_picture_remembers_what_it_was_drawn_with(draw, run, adapters, files, tmp_path):
    (path,) = draw("a red fox", *flags(adapters, files)).paths
    assert pixels(path).shape == (16, 16, 3)  # the prompt does not decide on the size
    settings = finish.read_settings(path)
    assert (settings["ip_adapter"], settings["image_prompt"]) == (str(adapters[0]), str(files[0]))
    assert {"ip_adapter", "image_prompt", "image_encoder"} <= settings["contents"].keys()
    again = run("--like", path, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == path.read_bytes() and not again.told[:-1]
    (plain,) = run("--like", path, "--ip_adapter", "", "--out", tmp_path / "plain").paths
    assert not {"ip_adapter", "image_prompt"} & finish.read_settings(plain).keys()
    assert np.abs(pixels(plain).astype(int) - pixels(path)).max() > 8


def test_other_files_under_the_same_names_are_told(draw, run, adapters, files, tmp_path):
    own, encoder = tmp_path / "own.safetensors", tmp_path / "encoder"
    own.write_bytes(adapters[0].read_bytes())
    tiny_encoder(encoder)
    (path,) = draw("a red fox", *flags([own], files, "--image_encoder", encoder)).paths
    save(files[0], picture(9))
    tiny_adapter(own, WIDTHS, UNET["cross_attention_dim"], seed=5)
    told = run("--like", path, "--out", tmp_path / "again").told
    for what, file in (("IP-Adapter", own), ("image prompt", files[0])):
        assert f"warning: {path} was drawn with another {what}: {file} has changed since" in told
    assert not any("another image encoder" in line for line in told)
    told = run("--like", path, "--ip_adapter", adapters[0], "--out", tmp_path / "other").told
    assert not any("has changed since" in line for line in told)  # all that was is another's now
    tiny_encoder(tmp_path / "image_encoder")
    (path,) = draw("a red fox", *flags([own], files)).paths
    shutil.rmtree(tmp_path / "image_encoder")
    tiny_encoder(tmp_path / "image_encoder", hidden_act="quick_gelu")
    told = run("--like", path, "--out", tmp_path / "again").told
    assert f"warning: {path} was drawn with another image encoder: that of {own} has changed since" in told
    files[0].unlink()
    gone = run("--like", path, "--out", tmp_path / "again")
    assert gone.code == cli.MISTAKE and "write --image_prompt FILE" in gone.told[-1]


def test_two_with_scales_of_their_own(draw, adapters, files):
    both = "--ip_adapter", f"{adapters[0]}=0.5,{adapters[1]}", "--seed", 3
    images = [
        pixels(draw("a fox", *both, "--image_prompt", f"{files[i]},{files[j]}").paths[0]).astype(int)
        for i, j in ((0, 1), (1, 0))
    ]
    assert np.abs(images[0] - images[1]).max() > 8  # each reads its own


def test_some_layers_alone(draw, run, adapters, files, tmp_path):
    plain = pixels(draw("a fox", "--seed", 3).paths[0]).astype(int)
    every, some = (
        draw("a fox", *flags(adapters, files), *more).paths[0]
        for more in ((), ("--ip_adapter_layers", "mid_block,down_blocks.0"))
    )
    assert finish.read_settings(some)["ip_adapter_layers"] == "mid_block,down_blocks.0"
    assert all(np.abs(pixels(some).astype(int) - other).max() > 4 for other in (plain, pixels(every)))
    again = run("--like", some, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == some.read_bytes()


def test_mistakes_are_one_line(run, model, adapters, files, tmp_path):
    adapter = "--ip_adapter", adapters[0]
    for more, message in (
        (adapter, "an IP-Adapter without a picture to see: write --image_prompt FILE"),
        (("--image_prompt", files[0]), "without an IP-Adapter: write --ip_adapter FILE, too"),
        (("--image_encoder", tmp_path), "without an IP-Adapter: write --ip_adapter FILE, too"),
        (("--ip_adapter_layers", "mid_block"), "without an IP-Adapter: write --ip_adapter FILE, too"),
        (
            (*adapter, "--image_prompt", files[0], "--ip_adapter_layers", "mid_block,"),
            "ip_adapter_layers='mid_block,': write NAME, with commas between several, such as up_blocks",
        ),
        ((*adapter, "--image_prompt", tmp_path / "no.png"), "no.png: No such file or directory; write the"),
        (("--ip_adapter", f"{adapters[0]}=much", "--image_prompt", files[0]), "write FILE or FILE=SCALE"),
        (
            ("--ip_adapter", f"{adapters[0]},{adapters[1]}", "--image_prompt", files[0]),
            "1 image prompts for 2 IP-Adapters: write one for each, with commas between them",
        ),
        (
            (*adapter, "--image_prompt", files[0], "--image_encoder", tmp_path),
            "has no config.json: this IP-Adapter reads an image encoder that says 12 numbers of a picture;",
        ),
    ):
        told = run("a fox", "--model", model, "--steps", 4, "--out", tmp_path / "out", *more)
        assert told.code == cli.MISTAKE, more
        assert message in told.told[-1], told.told
        assert not (tmp_path / "out").exists()


# ---- jobs

ROWS = [
    {"prompt": "a red fox"},
    {"prompt": "a cat", "image_prompt": "given/1.png"},
    {"prompt": "a dog", "image_prompt": "given/2.png", "image": "given/square.png", "strength": 0.5},
    {"prompt": "a car", "height": 16, "width": 32},
]


@pytest.fixture
def square(files, tmp_path):
    return save(tmp_path / "given" / "square.png", picture(7, 16, 16))


def test_rows_are_those_of_single_runs_bit_for_bit(job, draw, run, adapters, files, square, tmp_path):
    sixteen = "--batch_size", 16  # as many as prompts are encoded at once in a job
    outcome = job(*flags(adapters, files, *sixteen), rows=ROWS)
    assert outcome.code == cli.DONE, outcome.told
    found = facts(tmp_path / "out")
    for number, row in enumerate(ROWS):
        path = png_of(tmp_path / "out", number)
        again = run("--like", path, "--out", tmp_path / "again")
        assert again.paths[0].read_bytes() == path.read_bytes(), row
        own = [
            part
            for name in ("strength", "height", "width")
            if name in row
            for part in (f"--{name}", row[name])
        ]
        own += ["--image", tmp_path / row["image"]] if "image" in row else []
        read = tmp_path / row.get("image_prompt", "given/0.png")
        options = "--ip_adapter", adapters[0], "--image_prompt", read, "--seed", 3, "--first_index", number
        (alone,) = draw(row["prompt"], *options, *sixteen, *own, "--out", tmp_path / "alone").paths
        np.testing.assert_array_equal(pixels(alone), pixels(path))
    assert Image.open(png_of(tmp_path / "out", 3)).size == (32, 16)
    assert found[1]["edit"] == {"image_prompt": str(files[1])}
    assert run("--verify", tmp_path / "out").code == cli.DONE
    changes = {
        "ip_adapter": flags([f"{adapters[0]}=0.5"], files, *sixteen),
        "other pictures to change, or for networks to see": flags(adapters, files[1:], *sixteen),
    }
    for difference, change in changes.items():
        other = job(*change, rows=ROWS)
        assert other.code == cli.MISTAKE and "another job" in other.told[-1], other.told
        assert difference in other.told[-1]


def test_rows_that_cannot_be_drawn(job, adapters, files, tmp_path):
    rows = [
        {"prompt": "a fox", "image_prompt": "given/1.png"},
        {"prompt": "a cat"},
        {"prompt": "a dog", "image_prompt": "given/none.png"},
        {"prompt": "a car", "image_prompt": "../secret.png"},
        {"prompt": "a boat", "image_prompt": ""},
        {"prompt": "a tree", "image_prompt": "given/long.png"},
    ]
    save(tmp_path / "given" / "long.png", picture(6, 2, 202))
    save(tmp_path.parent / "secret.png", picture(5))
    assert job("--ip_adapter", adapters[0], rows=rows).code == cli.FAILED
    reasons = {row: one["reason"] for row, one in failures(tmp_path / "out").items()}
    assert reasons[1] == reasons[4] == "an IP-Adapter without a picture to see: write --image_prompt FILE"
    assert "long.png, an image prompt of 202 x 2 pixels: it may be 100 times as long" in reasons[5]
    assert "none.png: No such file" in reasons[2] and "leads out of the folder" in reasons[3]
    assert sorted(facts(tmp_path / "out")) == [0]
