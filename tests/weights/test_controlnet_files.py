"""ControlNets from single files: in the layout of diffusers, and of their original."""

import json

import jax
import numpy as np
import pytest
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from engine.types import UserError
from engine.weights.component import load_component, save_component
from engine.weights.controlnet import find, kind_of, load_controlnet, look, save_controlnet
from engine.weights.folder import load_folder
from engine.weights.original_names import slots
from tests.tiny import SHALLOW, XL, component, tiny_controlnet, tiny_folder

MODELS = {"SD": {}, "SDXL": XL}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """A model, the folder of a ControlNet of it, and that as a file of the original layout."""
    at, model = tmp_path_factory.mktemp("controlnet"), MODELS[request.param]
    tiny_folder(at / "model", **model)
    folder = tiny_controlnet(at / "net", **model.get("unet", {}))
    return load_folder(at / "model"), folder, original(folder, at / "original.safetensors")


def original(folder, path, prefix="control_model."):
    part, tensors = load_component(folder, "controlnet"), load_file(folder / WEIGHTS)
    places = slots("controlnet", part.config, tensors, prefix)
    save_file({places[key].key: array for key, array in tensors.items()}, path)
    return path


def changed(source, target, **others):
    tensors = load_file(source) | {key.replace("__", "."): value for key, value in others.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, target)
    return target


def assert_same(first, second):
    assert first.config == second.config
    assert jax.tree.structure(first.params) == jax.tree.structure(second.params)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_any_layout_is_the_network_of_the_folder(case, tmp_path):
    model, folder, file = case
    wanted = load_controlnet(model, folder)
    assert_same(load_controlnet(model, file), wanted)
    assert_same(load_controlnet(model, original(folder, tmp_path / "bare.safetensors", "")), wanted)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / WEIGHTS).read_bytes())
    assert_same(load_controlnet(model, alone), wanted)


def test_a_file_in_its_folder_is_that_folder(case, tmp_path):
    model, folder, _ = case
    part = load_controlnet(model, folder)
    save_controlnet(tmp_path / "net", part, "edges")
    file = tmp_path / "net" / WEIGHTS
    assert find(file) == tmp_path / "net" and kind_of(file) == "edges"
    assert load_controlnet(model, file).config == part.config


def test_beside_the_model_that_it_was_trained_beside(case, tmp_path):
    """As the first ControlNets were published."""
    model, folder, file = case
    others = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32), "logvar": np.zeros(1, np.float32)}
    save_file(load_file(file) | others, tmp_path / "whole.safetensors")
    assert_same(load_controlnet(model, tmp_path / "whole.safetensors"), load_controlnet(model, folder))


def test_of_a_model_without_attention_in_the_middle(tmp_path):
    """It has a file in the layout of diffusers, and none in the original."""
    folder = tiny_folder(tmp_path / "model", **SHALLOW)
    net = tiny_controlnet(tmp_path / "net", **SHALLOW["unet"])
    (tmp_path / "alone.safetensors").write_bytes((net / WEIGHTS).read_bytes())
    model = load_folder(folder)
    assert_same(load_controlnet(model, tmp_path / "alone.safetensors"), load_controlnet(model, net))


def test_diffusers_reads_the_same_in_the_original_layout(case, tmp_path):
    model, small, _ = case
    config = json.loads((small / "config.json").read_text())
    config["conditioning_embedding_out_channels"] = (4, 8, 8, 12)  # it knows of eight convolutions alone
    save_component(folder := tmp_path / "net", component("controlnet", config, 0))
    file = original(folder, tmp_path / "original.safetensors")
    found = convert_controlnet_checkpoint(load_torch(file), config)
    wanted = load_file(folder / WEIGHTS)
    if model.text_encoder_2 is not None:  # which it does not look for
        wanted = {key: array for key, array in wanted.items() if not key.startswith("add_embedding.")}
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), wanted[key], err_msg=key)


def test_one_of_another_model_is_one_line(case, tmp_path):
    model, _, _ = case
    words = model.unet.config.per_block("cross_attention_dim")[0]
    other = tiny_controlnet(tmp_path / "other", cross_attention_dim=2 * words)
    with pytest.raises(UserError, match=r"no ControlNet of this model.*wrong shape: .*attn2\.to_k") as error:
        load_controlnet(model, original(other, tmp_path / "other.safetensors"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"difference": np.zeros(1, np.float32)},
            "what is to be added to a model's weights, which is",
        ),
        ({"lora_controlnet": np.zeros(0, np.float32)}, "is a control-LoRA, which is not read"),
        (
            {
                f"control_model__input_hint_block__{i}__{end}": None
                for i in (4, 6)
                for end in ("weight", "bias")
            },
            "made for another model: pixels a side to a latent 1, and here 2",
        ),
        ({"task_embedding": np.zeros((6, 8), np.float32)}, "wrong.safetensors is no whole ControlNet union"),
        (
            {"control_model__input_hint_block__0__weight": None},
            "holds no ControlNet: it has none of",
        ),
        ({"control_model__input_hint_block__0__weight": np.array(1, np.float32)}, "holds no ControlNet"),
        ({"control_model__zero_convs__0__0__bias": None}, r"missing: \(1\) controlnet_down_blocks.0.bias"),
        ({"control_model__more": np.zeros(1, np.float32)}, r"unexpected: \(1\) control_model.more"),
    ],
)
def test_a_wrong_file_is_one_line(case, tmp_path, change, message):
    model, _, file = case
    with pytest.raises(UserError, match=message) as error:
        load_controlnet(model, changed(file, tmp_path / "wrong.safetensors", **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "none.safetensors",
            "no ControlNet .*none.safetensors: write the path of a .safetensors file, or",
        ),
        ("control_v11e_sd15_shuffle.safetensors", r"the mean of all places \(shuffle\), which is not read"),
        ("net.pth", "in a format that is never opened because it can run code"),
        ("none", "no ControlNet .*none: a ControlNet is a folder"),
    ],
)
def test_no_file_is_one_line(tmp_path, name, message):
    if "shuffle" in name:
        save_file({"a": np.zeros(1, np.float32)}, tmp_path / name)
    with pytest.raises(UserError, match=message):
        look(tmp_path / name)
