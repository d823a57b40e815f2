"""T2I-Adapters from folders and single files: in the layout of diffusers, and of their original."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.models.t2i_adapter import T2IAdapterConfig
from engine.types import UserError
from engine.weights.controlnet import load_controlnet
from engine.weights.folder import load_folder
from tests.tiny import tiny_folder, tiny_t2i_adapter
from tests.weights.test_controlnet_files import WEIGHTS, assert_same

# Levels as those of Stable Diffusion 1: a light adapter's last two have equally many channels.
UNET = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
}
XL_UNET = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
}
FULL = {"channels": (8, 16, 16), "num_res_blocks": 2}
LIGHT = {"channels": (8, 16), "num_res_blocks": 3, "adapter_type": "light_adapter"}
XL = {
    "channels": (8, 16, 16, 16),
    "num_res_blocks": 2,
    "downscale_factor": 4,
    "adapter_type": "full_adapter_xl",
}
CASES = {
    "full": (UNET, FULL),
    "full, of greys": (UNET, FULL | {"in_channels": 1}),
    "light": (UNET, LIGHT),
    "light, of greys": (UNET, LIGHT | {"in_channels": 1}),
    "xl": (XL_UNET, XL),
    "xl, of greys": (XL_UNET, XL | {"in_channels": 1}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each of the two U-Nets."""
    at = tmp_path_factory.mktemp("models")
    return {
        id(unet): load_folder(tiny_folder(at / str(i), unet=unet)) for i, unet in enumerate((UNET, XL_UNET))
    }


def tensors(folder):
    return load_file(folder / WEIGHTS)


def original(weights, light):
    """The names of TencentARC, which diffusers' scripts/convert_original_t2i_adapter.py takes back."""

    def name(key):
        key = key.removeprefix("adapter.")
        if light:
            return key.replace(".resnets.", ".body.")
        if found := re.match(r"body\.(\d+)\.(?:resnets\.(\d)\.)?", key):
            return f"body.{2 * int(found[1]) + int(found[2] or 0)}." + key[found.end() :]
        return key

    return {name(key): array for key, array in weights.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_folder(case, models, tmp_path):
    unet, options = CASES[case]
    model, folder = models[id(unet)], tiny_t2i_adapter(tmp_path / "folder", **options)
    whole = load_controlnet(model, folder)
    weights = tensors(folder)
    files = {"diffusers": weights, "original": original(weights, "light" in case)}
    assert not files["original"].keys() & weights.keys()
    for name, each in files.items():
        save_file(each, tmp_path / f"{name}.safetensors")
        assert_same(load_controlnet(model, tmp_path / f"{name}.safetensors"), whole)


def test_weights_in_a_folder_are_that_folder(models, tmp_path):
    folder = tiny_t2i_adapter(tmp_path / "folder", **LIGHT)
    found = load_controlnet(models[id(UNET)], folder / WEIGHTS)
    assert_same(found, load_controlnet(models[id(UNET)], folder))


@pytest.mark.parametrize(
    "unet, options, message",
    [
        (
            XL_UNET,
            FULL,
            r"made for another model: .* 8 \(2\), 16 \(4\), 16 \(8\), and here are 8 \(4\), 16 \(4\),",
        ),
        (UNET, XL, "made for another model"),
        (UNET, FULL | {"channels": (8, 8, 16)}, "made for another model"),
        (UNET, FULL | {"channels": (8, 16, 16, 16, 16)}, "made for another model"),
        (UNET, FULL | {"downscale_factor": 4}, "made for another model"),
    ],
)
def test_one_of_another_model_is_refused(unet, options, message, models, tmp_path):
    folder = tiny_t2i_adapter(tmp_path / "folder", **options)
    save_file(tensors(folder), tmp_path / "file.safetensors")
    for path in (folder, tmp_path / "file.safetensors"):
        with pytest.raises(UserError, match=message):
            load_controlnet(models[id(unet)], path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"body.2.down_opt.op.weight": np.zeros((8, 8, 3, 3), np.float32)},
            "no T2I-Adapter of this model.*down_opt",
        ),
        ({"conv_in.weight": np.zeros((8, 7, 3, 3), np.float32)}, "holds no T2I-Adapter that is known"),
        ({"body.0.block1.weight": np.zeros((), np.float32)}, "holds no T2I-Adapter that is known"),
    ],
)
def test_a_file_that_is_broken_or_unknown_is_one_line(change, message, models, tmp_path):
    weights = original(tensors(tiny_t2i_adapter(tmp_path / "folder", **FULL)), light=False) | change
    save_file(weights, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_controlnet(models[id(UNET)], tmp_path / "file.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"adapter_type": "full"},
            "adapter_type='full' is unknown; write one of full_adapter, full_adapter_xl",
        ),
        ({"in_channels": 4}, "in_channels=4: pictures have 3, greys 1"),
        ({"channels": []}, "channels=.*: write whole numbers from 1"),
        (
            {"channels": [8, 8, 8, 16], "adapter_type": "full_adapter_xl"},
            "the third and those behind it are eq",
        ),
        ({"channels": [8, 0]}, "channels=.*: write whole numbers from 1"),
    ],
)
def test_a_config_that_is_none_is_one_line(options, message):
    with pytest.raises(UserError, match=message):
        T2IAdapterConfig.from_json(options, "config.json")
