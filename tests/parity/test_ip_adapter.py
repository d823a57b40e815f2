"""IP-Adapters against diffusers': the same files, pictures and start latents."""

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.requests import Given
from tests.adapters import picture, tiny_adapter, tiny_encoder
from tests.parity.common import nchw
from tests.parity.pictures import NEGATIVES, PROMPTS, SCHEDULERS, How, pipeline, psnr, start_noise
from tests.tiny import UNET, XL, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Two levels that attend, one of them two layers deep: in the order of a U-Net's own attributes, which is
# that of adapters, its middle comes last.
TWO_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
}
DEEP = TWO_LEVELS | {"transformer_layers_per_block": (1, 2)}
# Down 16, 32; up 2 x 32, 2 x 16; middle 32. Every other layer attends to pixels.
OF_TWO = dict(zip(range(1, 15, 2), (16, 32, 32, 32, 16, 16, 32), strict=True))
OF_DEEP = dict(zip(range(1, 23, 2), (16, *(32,) * 6, 16, 16, *(32,) * 2), strict=True))
MODELS = {
    "SD": ({"unet": TWO_LEVELS}, OF_TWO, UNET["cross_attention_dim"]),
    "SDXL": (XL | {"unet": XL["unet"] | DEEP}, OF_DEEP, XL["unet"]["cross_attention_dim"]),
}
CASES = {
    "SD, plain": ("SD", [("plain", 0.8)], None),
    "SD, plus": ("SD", [("plus", 1.0)], None),
    "SD, full, in some layers": ("SD", [("full", 1.5)], "up_blocks.0.attentions.1"),
    "SDXL, two at once": ("SDXL", [("plus", 0.6), ("plain", 1.2)], None),
}
IN_LAYERS = {"up": {"block_0": [0.0, 1.5]}}  # the same to diffusers


@pytest.mark.parametrize("case", CASES)
def test_as_in_pytorch(tmp_path, case):
    kind, wanted, layers = CASES[case]
    model, widths, context = MODELS[kind]
    folder = tiny_folder(tmp_path / "model", **model, scheduler=SCHEDULERS["euler"])
    encoder = tiny_encoder(tmp_path / "image_encoder")
    files = [
        tiny_adapter(tmp_path / f"{i}.safetensors", widths, context, way, seed=i)
        for i, (way, _) in enumerate(wanted)
    ]
    scales = [scale for _, scale in wanted]
    how, shown = How(steps=4), [[picture(10 * i + j) for j in range(len(files))] for i in range(2)]
    drawn = {"steps": how.steps, "guidance_scale": how.scale, "latents": start_noise(how)}
    options = {"ip_adapter_layers": [layers]} if layers else {}
    ours = engine.load(folder, ip_adapter=list(zip(files, scales, strict=True)), **options)
    given = [Given(image_prompt=tuple(each)) for each in shown]
    here = ours.generate(PROMPTS, NEGATIVES, given=given, **drawn)

    theirs = pipeline(folder, model, how)
    theirs.load_ip_adapter(
        str(tmp_path),
        subfolder="",
        weight_name=[file.name for file in files],
        image_encoder_folder=encoder.name,
    )
    theirs.set_ip_adapter_scale(IN_LAYERS if layers else scales)
    theirs.set_progress_bar_config(disable=True)
    for i, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVES, strict=True)):
        there = theirs(
            prompt,
            negative_prompt=negative or None,  # of SDXL: zeros
            ip_adapter_image=[Image.fromarray(each) for each in shown[i]],
            latents=torch.from_numpy(nchw(drawn["latents"][i : i + 1]).copy()),
            num_inference_steps=how.steps,
            guidance_scale=how.scale,
            height=16,
            width=16,
            output_type="np",
        ).images[0]
        assert psnr(here[i], np.round(there * 255)) > 45
    plain = engine.load(folder).generate(PROMPTS, NEGATIVES, **drawn)
    assert max(map(psnr, here, plain)) < 30  # so that adapters are seen to matter
