"""A LoRA of SDXL means the same here and in PyTorch diffusers, in its format and in kohya's."""

import diffusers
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import engine
from engine.weights import lora_files
from engine.weights.folder import load_folder
from engine.weights.lora import XL_KINDS
from engine.weights.names import to_key
from engine.weights.original_names import UNET, slots
from tests.kohya import XL_KINDS as KOHYA
from tests.kohya import as_kohya
from tests.parity.common import nchw
from tests.parity.pictures import PROMPTS, SCHEDULERS, psnr
from tests.parity.test_lora import ATTENTION, GUIDANCE, LATENTS, TEXT, random_lora
from tests.tiny import XL, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

STEPS = 6
TARGETS = (*ATTENTION, *TEXT, "proj_in", "net.*", "fc1", "conv_in", "conv1", "conv2", "add_embedding.*")
ALPHA = 4.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("lora") / "model", **XL, scheduler=SCHEDULERS["euler"])


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """The same LoRA in diffusers' format, and in kohya's with either names for the layers of the U-Net."""
    at = tmp_path_factory.mktemp("files")
    parts = load_folder(folder).parts
    configs = {kind: parts[kind].config for kind in XL_KINDS}
    ours = lora_files.save(at / "diffusers.safetensors", random_lora(configs, TARGETS, alpha=ALPHA))
    weights = [to_key(path) for path in traverse_util.flatten_dict(parts["unet"].params)]
    original = {
        key.removesuffix(".weight"): slot.key.removeprefix(UNET).removesuffix(".weight")
        for key, slot in slots("unet", configs["unet"], weights, UNET).items()
    }
    tensors = load_file(ours)
    few = {layer: name for layer, name in original.items() if "add" in layer}  # diffusers knows no other
    save_file(as_kohya(tensors, ALPHA, KOHYA, few), at / "kohya.safetensors")
    save_file(as_kohya(tensors, ALPHA, KOHYA, original), at / "original.safetensors")
    return at


def test_all_formats_mean_what_they_mean_in_diffusers(folder, files):
    def here(*loras):
        pipe = engine.load(folder, lora=loras)
        return pipe.generate(PROMPTS, steps=STEPS, guidance_scale=GUIDANCE, latents=LATENTS)

    def there():
        start = torch.from_numpy(nchw(LATENTS).copy())
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
        return np.round(pipeline(PROMPTS, latents=start, **options).images * 255)

    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    ours, without = here((files / "diffusers.safetensors", 1.0)), there()
    for name in ("diffusers", "kohya", "original"):
        pipeline.load_lora_weights(files / f"{name}.safetensors")
        theirs = there()
        pipeline.unload_lora_weights()
        assert psnr(ours, theirs) >= 45, name
        assert psnr(without, theirs) < 20, name  # the LoRA is seen


def test_all_formats_are_the_same(folder, files):
    configs = {kind: part.config for kind, part in load_folder(folder).parts.items() if kind in XL_KINDS}
    read = [lora_files.read(file, configs) for file in sorted(files.iterdir())]
    for other in read[1:]:
        assert other.layers.keys() == read[0].layers.keys() and other.alphas == read[0].alphas
        for name, layer in other.layers.items():
            for side in "ab":
                np.testing.assert_array_equal(layer[side], read[0].layers[name][side])
    assert {name.partition(".")[0] for name in read[0].layers} == set(XL_KINDS)
    keys = " ".join(load_file(files / "original.safetensors"))
    for part in ("input_blocks_1_1_transformer_blocks_0_attn1_to_q", "middle_block_1_", "label_emb_0_2"):
        assert f"lora_unet_{part}" in keys
