"""Single files, held against the converters of PyTorch diffusers, which read the same layout."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils as theirs
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import CLIPTextConfig, CLIPTextModel

import engine
from engine.types import UserError
from engine.weights import single_file, single_file_written
from tests.parity.common import nchw
from tests.parity.pictures import psnr
from tests.single import foreign, like, whole_open_clip

pytestmark = pytest.mark.usefixtures("quick_compiler")

NUMBERS = (1, 2)
PROMPT = "a red fox at night"
# What the original programs' configs (v1-inference.yaml, v2-inference-v.yaml) would say of the tiny models.
ORIGINAL = {
    "image_size": 32,  # unused
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": 2,
    "attention_resolutions": [1],
    "transformer_depth": 1,
    "context_dim": 64,
}
ORIGINALS = (
    ORIGINAL
    | {"model_channels": 32, "channel_mult": [1, 2, 2], "attention_resolutions": [2, 1], "num_heads": 8},
    ORIGINAL
    | {
        "model_channels": 64,
        "channel_mult": [1, 2],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
    },
)
ORIGINAL_VAE = {
    "ch": 32,
    "ch_mult": [1, 2],
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": 4,
    "num_res_blocks": 2,
}


@pytest.fixture(scope="module", params=NUMBERS)
def case(request, tmp_path_factory):
    """The number of the Stable Diffusion, a tiny folder of it, and the single file of that."""
    at = tmp_path_factory.mktemp(f"sd{request.param}")
    folder = like(request.param, at / "model")
    single_file_written.to_file(folder, at / "model.safetensors")
    return request.param, folder, at / "model.safetensors"


def config(folder, kind):
    return json.loads((folder / kind / "config.json").read_text())


def stored(folder, kind):
    (file,) = (folder / kind).glob("*.safetensors")
    return load_file(file)


def assert_equal(converted, wanted):
    assert converted.keys() == wanted.keys()
    for key, tensor in converted.items():
        np.testing.assert_array_equal(tensor.numpy(), wanted[key], err_msg=key)


def test_diffusers_reads_the_same_unet_and_vae(case):
    _, folder, file = case
    checkpoint = load_torch(file)
    unet = theirs.convert_ldm_unet_checkpoint(checkpoint, config(folder, "unet"))
    assert_equal(unet, stored(folder, "unet"))
    vae = theirs.convert_ldm_vae_checkpoint(checkpoint, config(folder, "vae"))
    assert_equal(vae, stored(folder, "vae"))


def test_diffusers_reads_the_same_text_encoder(case):
    number, folder, file = case
    wanted = stored(folder, "text_encoder")
    if number == 1:
        assert_equal(theirs.convert_ldm_clip_checkpoint(load_torch(file)), wanted)
        return
    options = {k: v for k, v in config(folder, "text_encoder").items() if k != "architectures"}
    model = CLIPTextModel(CLIPTextConfig(**options))
    assert_equal(theirs.convert_open_clip_checkpoint(model, load_torch(file)), wanted)


def test_what_diffusers_reads_in_a_whole_file_of_2_is_read_here(tmp_path):
    """With the last layer, which neither uses. Theirs knows its number, which is another in a tiny file."""
    folder = like(2, tmp_path / "model")
    bare = load_file(foreign(folder, tmp_path / "bare.safetensors"))
    file = foreign(folder, tmp_path / "whole.safetensors", whole_open_clip(bare))
    single_file.to_folder(file, tmp_path / "back", folder)
    model = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_attention_heads=1))
    read = theirs.convert_open_clip_checkpoint(model, load_torch(file))
    read = {k: v for k, v in read.items() if ".layers.2." not in k and k != "text_projection.weight"}
    assert_equal(read, stored(tmp_path / "back", "text_encoder"))


def test_the_configs_are_those_that_diffusers_makes_of_the_original_ones(case, tmp_path):
    number, folder, _ = case
    file = foreign(folder, tmp_path / "model.safetensors")
    single_file.to_folder(file, tmp_path / "back", folder)
    stages = {"ddconfig": ORIGINAL_VAE}
    params = {"unet_config": {"params": ORIGINALS[number - 1]}, "first_stage_config": {"params": stages}}
    original = {"model": {"params": params | {"scale_factor": 0.18215}}}
    checkpoint = load_torch(file)

    def same(kind, made, *but):
        ours = config(tmp_path / "back", kind)
        made = {key: list(value) if isinstance(value, tuple) else value for key, value in made.items()}
        for name, value in made.items():
            if name in ours and name not in but:
                assert ours[name] == value, name

    # the sizes of pictures are of other files: theirs tells them by keys that only files of full size have
    same("unet", theirs.create_unet_diffusers_config_from_ldm(original, checkpoint), "sample_size")
    same("vae", theirs.create_vae_diffusers_config_from_ldm(original, checkpoint), "sample_size")


def test_the_same_picture_from_the_folder_the_file_and_the_folder_of_it(case, tmp_path, monkeypatch):
    """diffusers draws from the single file itself."""
    _, folder, file = case
    single_file.to_folder(file, tmp_path / "back", folder / "tokenizer")
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    options = {"steps": 4, "guidance_scale": 3.0, "latents": latents, "height": 16, "width": 16, "seed": 0}
    before = engine.load(folder).generate([PROMPT], **options)
    after = engine.load(tmp_path / "back").generate([PROMPT], **options)
    np.testing.assert_array_equal(before, after)
    pipeline = StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.from_numpy(nchw(latents).copy())
    drawn = pipeline(
        [PROMPT],
        latents=start,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="np",
    )
    assert before.std() > 20
    assert psnr(before, np.round(drawn.images * 255)) >= 40


def test_the_advice_on_a_ckpt_works(tmp_path):
    """As Lightning writes one, with numbers among the tensors, a shared tensor and a view."""
    matrix = torch.arange(6.0).reshape(2, 3)
    state = {"a": matrix, "shared": matrix, "view": matrix.T, "epoch": 3}
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="never opened because it can run code") as refused:
        single_file.to_folder(tmp_path / "model.ckpt", tmp_path / "back")
    code = re.search(r'python -c "(.+)"$', str(refused.value))
    assert code
    subprocess.run([sys.executable, "-c", code[1]], check=True)
    del state["epoch"]
    assert_equal(load_torch(tmp_path / "model.safetensors"), {k: v.numpy() for k, v in state.items()})
