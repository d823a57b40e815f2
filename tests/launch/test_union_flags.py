"""--control_mode: ControlNet unions, which see pictures of many kinds, alone and several at once."""

import numpy as np
import pytest

import engine
from engine import finish
from engine.types import UserError
from launch import cli
from tests.launch.test_control_flags import noise
from tests.launch.test_edit_flags import pixels, save
from tests.tiny import XL, shallow, tiny_controlnet, tiny_folder, tiny_union

SMALL = shallow(XL)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """In place of the tiny model of other tests. Do not write here."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "xl", **SMALL)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """A union, and a plain ControlNet."""
    folder = tmp_path_factory.mktemp("nets")
    return tiny_union(folder / "union", **SMALL["unet"]), tiny_controlnet(folder / "plain", **SMALL["unet"])


@pytest.fixture
def files(tmp_path):
    (tmp_path / "given").mkdir()
    return [save(tmp_path / "given" / f"{i}.png", noise(i)) for i in range(2)]


def flags(nets, files, mode, *more):
    return "--controlnet", nets[0], "--control_image", files[0], "--control_mode", mode, "--seed", 3, *more


def test_a_picture_remembers_of_which_kind_it_saw_one(draw, run, nets, files, tmp_path):
    (path,) = draw("a red fox", *flags(nets, files, "canny")).paths
    assert finish.read_settings(path)["control_mode"] == "canny"
    (again,) = run("--like", path, "--out", tmp_path / "again").paths
    assert again.read_bytes() == path.read_bytes()
    (number,) = draw("a red fox", *flags(nets, files, 3), "--out", tmp_path / "number").paths
    np.testing.assert_array_equal(pixels(number), pixels(path))
    (other,) = run("--like", path, "--control_mode", "depth", "--out", tmp_path / "other").paths
    assert np.abs(pixels(other).astype(int) - pixels(path)).max() > 8
    (plain,) = run("--like", path, "--controlnet", "", "--out", tmp_path / "plain").paths
    assert "control_mode" not in finish.read_settings(plain)


def test_two_pictures_at_once_whatever_is_drawn_beside_them(draw, nets, files, tmp_path):
    """One network that sees both: neither the first alone, nor the sum of two."""

    def drawn(count, first, second, modes, scales=("0.7", "0.4")):
        named = ",".join(f"{nets[0]}={scale}" for scale in scales)
        both = "--control_image", f"{first},{second}", "--control_mode", modes
        done = draw(*["a fox"] * count, "--seed", 3, "--controlnet", named, *both)
        return [pixels(path).astype(int) for path in done.paths[:count]]

    (image,) = drawn(1, *files, "canny,depth")
    beside = drawn(2, *files, "canny,depth")
    assert np.abs(beside[0] - image).max() <= 1  # batches of one and of two may round otherwise
    (exchanged,) = drawn(1, *files[::-1], "depth,canny", ("0.4", "0.7"))
    assert np.abs(exchanged - image).max() <= 1  # a sum in another order
    (of_another,) = drawn(1, *files, "depth,canny")
    assert np.abs(of_another - image).max() > 8


def test_beside_a_plain_one(draw, nets, files):
    """The kind is the union's, wherever it stands."""
    images = []
    for named, seen in ((nets, files), (nets[::-1], files[::-1])):
        both = "--controlnet", f"{named[0]},{named[1]}", "--control_image", f"{seen[0]},{seen[1]}"
        done = draw("a fox", "--seed", 3, *both, "--control_mode", "hed")
        images.append(pixels(done.paths[0]).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1  # a sum in another order


def test_mistakes_are_one_line(run, model, nets, files, tmp_path):
    union, plain = nets
    seen = "--control_image", files[0]
    for more, message in (
        (("--controlnet", union, *seen), f"{union} sees many kinds of pictures (a union): say of which"),
        (
            ("--controlnet", plain, *seen, "--control_mode", "canny"),
            "control_mode=canny: it is for ControlNet unions, of which 0 are named",
        ),
        (
            ("--controlnet", union, *seen, "--control_mode", "canny,depth"),
            "control_mode=canny,depth: it is for ControlNet unions, of which 1 are named",
        ),
        (flags(nets, files, "cany"), "control_mode='cany' is unknown (did you mean canny?); write openpose,"),
        (flags(nets, files, "tile"), f"control_mode=tile: {union} knows 4 kinds of pictures, from 0"),
        (("--control_mode", "canny"), "control_mode=canny without a ControlNet: write --controlnet FOLDER"),
    ):
        told = run("a fox", "--model", model, "--steps", 2, "--out", tmp_path / "out", *more)
        assert told.code == cli.MISTAKE, more
        assert message in told.told[-1], told.told
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [-1, 4, "tile"])
def test_a_kind_that_it_does_not_know_is_told_in_python(model, nets, mode):
    with pytest.raises(UserError, match=f"control_mode={mode}: .* knows 4 kinds of pictures, from 0"):
        engine.load(model, controlnet=[(nets[0], 1.0)], control_mode=[mode])


def test_a_job_goes_on_with_the_same_kind_alone(job, nets, files):
    """The kind is of the whole job."""
    assert job(*flags(nets, files, "canny")).code == cli.DONE
    assert job(*flags(nets, files, "canny")).code == cli.DONE
    other = job(*flags(nets, files, "depth"))
    assert other.code == cli.MISTAKE and "control_mode 'canny' there and 'depth' here" in other.told[-1]
