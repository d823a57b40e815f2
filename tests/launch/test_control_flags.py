"""--controlnet and --control_image: runs and jobs, what pictures remember of them, mistakes in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from engine import finish, sights
from engine.jobs import given
from engine.weights.component import load_component
from engine.weights.controlnet import save_controlnet
from launch import cli
from tests.launch.test_bulk import facts, png_of
from tests.launch.test_edit_flags import pixels, save
from tests.launch.test_edit_jobs import failures
from tests.tiny import tiny_controlnet


def noise(seed, height=16, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    return [tiny_controlnet(folder / name, seed=i) for i, name in enumerate(("edges", "depth"))]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "given").mkdir()
    return [save(tmp_path / "given" / f"{i}.png", noise(i)) for i in range(3)]


def flags(nets, files, *more):
    return "--controlnet", nets[0], "--control_image", files[0], "--seed", 3, *more


def test_a_picture_remembers_what_it_was_drawn_with(draw, run, nets, files, tmp_path):
    (path,) = draw("a red fox", *flags(nets, files, "--control_end", 0.5)).paths
    settings = finish.read_settings(path)
    assert (settings["controlnet"], settings["control_image"]) == (str(nets[0]), str(files[0]))
    assert settings["control_end"] == 0.5 and "strength" not in settings
    assert {"controlnet", "control_image"} <= settings["contents"].keys()
    again = run("--like", path, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == path.read_bytes()
    (whole,) = run("--like", path, "--control_end", 1, "--out", tmp_path / "whole").paths
    assert np.abs(pixels(whole).astype(int) - pixels(path)).max() > 8
    assert "controlnet" not in finish.read_settings(draw("a red fox", "--seed", 3).paths[0])


def test_another_picture_or_net_under_the_same_name_is_told(draw, run, nets, files, tmp_path):
    own = tmp_path / "own"
    tiny_controlnet(own, seed=2)
    (path,) = draw("a red fox", *flags([own], files)).paths
    save(files[0], noise(9))
    told = run("--like", path, "--out", tmp_path / "again").told
    assert f"warning: {path} was drawn with another control picture: {files[0]} has changed since" in told
    files[0].unlink()
    gone = run("--like", path, "--out", tmp_path / "again")
    assert gone.code == cli.MISTAKE
    assert "with the control picture" in gone.told[-1] and "write --control_image FILE" in gone.told[-1]


def test_two_with_scales_of_their_own(draw, nets, files):
    both = "--controlnet", f"{nets[0]}=0.5,{nets[1]}", "--seed", 3
    images = [
        pixels(draw("a fox", *both, "--control_image", f"{first},{second}").paths[0]).astype(int)
        for first, second in ((files[0], files[1]), (files[1], files[0]))
    ]
    alone = pixels(draw("a fox", *flags(nets, files)).paths[0]).astype(int)
    assert np.abs(images[0] - images[1]).max() > 8  # each sees its own
    assert np.abs(images[0] - alone).max() > 8


def test_a_single_file_draws_as_its_folder_does(draw, run, nets, files, tmp_path):
    file = tmp_path / "net.safetensors"
    file.write_bytes((nets[0] / "diffusion_pytorch_model.safetensors").read_bytes())
    (path,), (whole,) = (draw("a fox", *flags([net], files)).paths for net in (file, nets[0]))
    np.testing.assert_array_equal(pixels(path), pixels(whole))
    again = run("--like", path, "--out", tmp_path / "again")
    assert again.paths[0].read_bytes() == path.read_bytes()


def test_its_picture_decides_on_the_size(draw, nets, tmp_path):
    file = save(tmp_path / "wide.png", noise(4, 45, 100))
    (path,) = draw("a fox", *flags(nets, [file], "--height", 16)).paths
    assert pixels(path).shape == (16, 32, 3)


def test_beside_a_picture_to_change(draw, nets, files, tmp_path):
    mask = save(tmp_path / "mask.png", np.repeat(np.uint8([[255], [0]]), 8, 0).repeat(16, 1))
    changed = "--image", files[1], "--mask", mask
    (path,) = draw("a fox", *flags(nets, files), *changed).paths
    np.testing.assert_array_equal(pixels(path)[8:], pixels(files[1])[8:])
    (other,) = draw("a fox", *flags(nets, files[2:]), *changed).paths
    assert np.abs(pixels(path).astype(int) - pixels(other)).max() > 8


def test_mistakes_are_one_line(run, model, nets, files, tmp_path):
    square, wide = files[0], save(tmp_path / "wide.png", noise(4, 45, 100))
    net = "--controlnet", nets[0]
    for more, message in (
        ((*net,), "a ControlNet without a picture to see: write --control_image FILE"),
        (("--control_image", square), "without a ControlNet: write --controlnet FOLDER, too"),
        (("--control_end", 0.5), "control_end=0.5 without a ControlNet: write --controlnet FOLDER, too"),
        (
            (*net, "--control_image", square, "--control_end", 2),
            "control_end=2.0 is out of range; write 0",
        ),
        ((*net, "--control_image", tmp_path / "no.png"), "no.png: No such file or directory; write the file"),
        ((*net, "--control_image", square, "--image", wide), "belong together have the same proportions"),
        (("--controlnet", f"{nets[0]}=much", "--control_image", square), "write FOLDER or FOLDER=SCALE"),
        (
            ("--controlnet", model, "--control_image", square),
            "is a model, no ControlNet: write the folder",
        ),
        (
            ("--controlnet", f"{nets[0]},{nets[1]}", "--control_image", square),
            "1 control pictures for 2 ControlNets: write one for each, with commas between them",
        ),
        (
            ("--controlnet", f"{nets[0]},{nets[1]}", "--control_image", f"{square},"),
            "there is no file between two commas",
        ),
        ((*net, "--control_image", square, "--control_kind", "edge"), "(did you mean edges?); write edges,"),
    ):
        told = run("a fox", "--model", model, "--steps", 4, "--out", tmp_path / "out", *more)
        assert told.code == cli.MISTAKE, more
        assert message in told.told[-1], told.told
        assert not (tmp_path / "out").exists()


def test_the_last_of_it_is_left_out_of_a_picture_drawn_again(draw, run, nets, files, tmp_path):
    (path,) = draw("a red fox", *flags(nets, files, "--control_end", 0.5, "--control_kind", "grey")).paths
    (plain,) = run("--like", path, "--controlnet", "", "--out", tmp_path / "plain").paths
    assert not any(name.startswith("control") for name in finish.read_settings(plain))
    (usual,) = draw("a red fox", "--seed", 3, "--out", tmp_path / "usual").paths
    np.testing.assert_array_equal(pixels(plain), pixels(usual))


def test_what_is_transparent_keeps_its_colour_as_in_diffusers(draw, nets, tmp_path):
    image = noise(6)
    solid = save(tmp_path / "solid.png", image)
    clear = save(tmp_path / "clear.png", np.dstack([image, np.zeros((16, 16), np.uint8)]))
    here, there = (pixels(draw("a fox", *flags(nets, [file])).paths[0]) for file in (solid, clear))
    np.testing.assert_array_equal(here, there)


def test_kinds_of_sight(draw, nets, files, tmp_path):
    (path,) = draw("a fox", *flags(nets, files, "--control_kind", "grey")).paths
    assert finish.read_settings(path)["control_kind"] == "grey"
    grey = save(tmp_path / "grey.png", sights.seen("grey", noise(0)))
    (other,) = draw("a fox", *flags(nets, [grey])).paths
    np.testing.assert_array_equal(pixels(path), pixels(other))


def test_one_that_says_what_it_has_learned_is_shown_that(draw, nets, files, tmp_path):
    """Each its own, and another only where that is asked for."""
    part = load_component(nets[0], "controlnet")
    save_controlnet(tmp_path / "grey", part, "grey")
    own = draw("a fox", *flags([tmp_path / "grey"], files)).paths[0]
    assert "control_kind" not in finish.read_settings(own)
    plain, grey = (
        pixels(draw("a fox", *flags([tmp_path / "grey"], files, "--control_kind", kind)).paths[0])
        for kind in ("none", "grey")
    )
    np.testing.assert_array_equal(pixels(own), grey)
    assert np.abs(grey.astype(int) - plain).max() > 4
    both = "--controlnet", f"{tmp_path / 'grey'},{nets[1]}", "--seed", 3
    seen = save(tmp_path / "seen.png", sights.seen("grey", noise(0)))
    first, second = (
        pixels(draw("a fox", *both, "--control_image", f"{file},{files[1]}").paths[0])
        for file in (files[0], seen)
    )
    np.testing.assert_array_equal(first, second)  # greys of greys are the same; the other is shown all


# ---- jobs

ROWS = [
    {"prompt": "a red fox"},
    {"prompt": "a cat", "control_image": "given/1.png"},
    {"prompt": "a dog", "control_image": "given/2.png", "image": "given/0.png", "strength": 0.5},
    {"prompt": "a car", "control_image": "given/wide.png", "height": 16},
]


@pytest.fixture
def wide(files, tmp_path):
    return save(tmp_path / "given" / "wide.png", noise(4, 16, 32))


def test_rows_are_those_of_single_runs_bit_for_bit(job, draw, run, nets, files, wide, tmp_path):
    sixteen = "--batch_size", 16  # as many as prompts are encoded at once in a job
    outcome = job(*flags(nets, files, *sixteen), rows=ROWS)
    assert outcome.code == cli.DONE, outcome.told
    found = facts(tmp_path / "out")
    for number, row in enumerate(ROWS):
        path = png_of(tmp_path / "out", number)
        again = run("--like", path, "--out", tmp_path / "again")
        assert again.code == cli.DONE, again.told
        assert again.paths[0].read_bytes() == path.read_bytes(), row
        own = [part for name in ("strength", "height") if name in row for part in (f"--{name}", row[name])]
        own += ["--image", tmp_path / row["image"]] if "image" in row else []
        seen = tmp_path / row.get("control_image", "given/0.png")
        options = "--controlnet", nets[0], "--control_image", seen, "--seed", 3, "--first_index", number
        (alone,) = draw(row["prompt"], *options, *sixteen, *own, "--out", tmp_path / "alone").paths
        np.testing.assert_array_equal(pixels(alone), pixels(path))
    assert Image.open(png_of(tmp_path / "out", 3)).size == (32, 16)
    assert found[1]["edit"] == {"control_image": str(files[1])}
    assert found[2]["edit"]["strength"] == 0.5 and found[2]["edit"]["image"] == str(files[0])
    assert run("--verify", tmp_path / "out").code == cli.DONE


def test_a_job_knows_its_controlnet_and_pictures(job, nets, files, wide, tmp_path):
    assert job(*flags(nets, files), rows=ROWS).code == cli.DONE
    assert job(*flags(nets, files), rows=ROWS).code == cli.DONE
    for change, difference in (
        (flags(nets[1:], files), "controlnet"),
        (flags([f"{nets[0]}=0.5"], files), "controlnet"),
        (flags(nets, files[1:]), "other pictures to change, or for networks to see"),
        (flags(nets, files, "--control_start", 0.5), "control_start None there and 0.5 here"),
        (flags(nets, files, "--control_kind", "grey"), "control_kind None there and 'grey' here"),
    ):
        outcome = job(*change, rows=ROWS)
        assert outcome.code == cli.MISTAKE
        assert difference in outcome.told[-1] and "another job" in outcome.told[-1], outcome.told


def test_rows_that_cannot_be_drawn(job, nets, files, tmp_path):
    rows = [
        {"prompt": "a fox", "control_image": "given/1.png"},
        {"prompt": "a cat"},
        {"prompt": "a dog", "control_image": "given/none.png"},
        {"prompt": "a car", "control_image": "../secret.png"},
        {"prompt": "a boat", "control_image": ""},
    ]
    save(tmp_path.parent / "secret.png", noise(5))
    outcome = job("--controlnet", nets[0], rows=rows)
    assert outcome.code == cli.FAILED, outcome.told
    reasons = {row: one["reason"] for row, one in failures(tmp_path / "out").items()}
    nothing = "a ControlNet without a picture to see: write --control_image FILE"
    assert reasons[1] == reasons[4] == nothing
    assert "none.png: No such file" in reasons[2] and "leads out of the folder" in reasons[3]
    assert sorted(facts(tmp_path / "out")) == [0]


def test_rows_of_two_controlnets_name_two_files(job, nets, files, tmp_path, monkeypatch):
    rows = [
        {"prompt": "a fox", "control_image": "given/0.png,given/1.png"},
        {"prompt": "a cat", "control_image": "given/0.png"},
        {"prompt": "a dog", "control_image": "given/0.png,../given/../../x.png"},
        {"prompt": "a car", "control_image": "given/0.png,"},
        {"prompt": "a boat", "control_image": f"given/0.png,{tmp_path.parent / 'x.png'}"},
    ]
    opened = []
    monkeypatch.setattr(
        given, "_opened", lambda path, real=given._opened: (opened.append(path), real(path))[1]
    )
    assert job("--controlnet", f"{nets[0]},{nets[1]}", rows=rows).code == cli.FAILED
    reasons = {row: one["reason"] for row, one in failures(tmp_path / "out").items()}
    assert "1 control pictures for 2 ControlNets" in reasons[1] and "leads out of the folder" in reasons[2]
    assert "there is no file between two commas" in reasons[3] and "is an absolute path" in reasons[4]
    assert facts(tmp_path / "out")[0]["edit"] == {"control_image": f"{files[0]},{files[1]}"}
    assert set(opened) == {str(files[0]), str(files[1])}


def test_a_comma_in_the_folder_would_part_control_pictures(draw, nets, files, tmp_path):
    folder = tmp_path / "x,y"
    folder.mkdir()
    for i in range(2):
        save(folder / f"{i}.png", noise(i))
    rows = [{"prompt": "a fox", "control_image": "0.png,1.png"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = draw("--prompts_file", folder / "rows.jsonl", "--controlnet", f"{nets[0]},{nets[1]}")
    assert outcome.code == cli.FAILED
    (failure,) = failures(tmp_path / "out").values()
    assert "has a comma in its name, which parts pictures: rename it" in failure["reason"]
    save(folder / "a,b.png", noise(2))  # of one ControlNet it parts nothing, in a file's name neither
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a fox", "control_image": "a,b.png"}))
    out = tmp_path / "one"
    outcome = draw("--prompts_file", folder / "rows.jsonl", "--controlnet", nets[0], "--out", out)
    assert outcome.code == cli.DONE, outcome.told
    assert facts(out)[0]["edit"] == {"control_image": str(folder / "a,b.png")}


def test_a_mask_without_a_picture_to_change_is_told(job, nets, files, tmp_path):
    mask = save(tmp_path / "mask.png", np.full((16, 16), 255, np.uint8))
    outcome = job(*flags(nets, files, "--mask", mask), rows=ROWS[:2])
    assert outcome.code == cli.MISTAKE and "without a picture" in outcome.told[-1]
