"""ControlNet unions from folders, whatever these call them, and from single files."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from engine.models.controlnet_union import ControlNetUnionConfig
from engine.types import UserError
from engine.weights.controlnet import find, kinds_known, load_controlnet, look
from engine.weights.folder import load_folder
from tests.tiny import XL, tiny_controlnet, tiny_folder, tiny_union
from tests.weights.test_controlnet_files import WEIGHTS, assert_same


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_folder(tiny_folder(tmp_path_factory.mktemp("union") / "model", **XL))


@pytest.fixture
def union(tmp_path):
    return tiny_union(tmp_path / "union", kinds=5, **XL["unet"])


def told(folder, **changes):
    """config.json with these options; without those that are None."""
    options = json.loads((folder / "config.json").read_text()) | changes
    known = {name: value for name, value in options.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(known))


def test_a_folder_is_a_union_by_its_weights(model, union):
    """The first were published as plain ControlNets, whose configs say nothing of kinds."""
    wanted = load_controlnet(model, union)
    assert isinstance(wanted.config, ControlNetUnionConfig) and kinds_known(union) == 5
    assert wanted.config.num_control_type == 5
    named = [name for name in json.loads((union / "config.json").read_text()) if name.startswith("num_")]
    named.append("conditioning_embedding_out_channels")
    told(union, _class_name="ControlNetModel", **dict.fromkeys(named))
    found = load_controlnet(model, union)
    assert found.config.num_trans_head == 8 != wanted.config.num_trans_head  # by which nothing is computed
    for name in ("num_control_type", "num_trans_channel", "num_trans_layer", "num_proj_channel", "scale"):
        assert getattr(found.config, name) == getattr(wanted.config, name)


def test_a_file_is_the_network_of_its_folder(model, union, tmp_path):
    told(union, num_trans_head=8)
    wanted = load_controlnet(model, union)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((union / WEIGHTS).read_bytes())
    assert kinds_known(alone) == 5 and look(alone) is None
    assert_same(load_controlnet(model, alone), wanted)


def test_another_that_lies_beside_it(model, union, tmp_path):
    """As "promax", which knows of more kinds and has the same config.json."""
    more = tiny_union(tmp_path / "more", seed=1, kinds=8, **XL["unet"])
    beside = union / "diffusion_pytorch_model_promax.safetensors"
    beside.write_bytes((more / WEIGHTS).read_bytes())
    assert find(beside) == beside and find(union / WEIGHTS) == union
    assert (kinds_known(beside), kinds_known(union)) == (8, 5)
    assert load_controlnet(model, beside).config.num_control_type == 8
    assert load_controlnet(model, union).config.num_control_type == 5


def test_a_plain_one_is_none(tmp_path):
    assert not kinds_known(tiny_controlnet(tmp_path / "net", **XL["unet"]))


def test_one_that_is_not_whole_is_one_line(model, union, tmp_path):
    tensors = load_file(union / WEIGHTS)
    for left_out, message in (
        ("spatial_ch_projs.weight", "is no whole ControlNet union: it lacks a matrix task_embedding or"),
        ("transformer_layes.0.attn.in_proj_bias", r"missing: \(1\) transformer_layes.0.attn.in_proj_bias"),
    ):
        file = tmp_path / "part.safetensors"
        save_file({key: array for key, array in tensors.items() if key != left_out}, file)
        with pytest.raises(UserError, match=message) as error:
            load_controlnet(model, file)
        assert "\n" not in str(error.value)


def test_of_another_model_is_one_line(union, tmp_path):
    other = load_folder(tiny_folder(tmp_path / "other"))
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((union / WEIGHTS).read_bytes())
    for path, message in ((union, "was made for another model: "), (alone, "union of another model: ")):
        with pytest.raises(UserError, match=message) as error:
            load_controlnet(other, path)
        assert "\n" not in str(error.value)
