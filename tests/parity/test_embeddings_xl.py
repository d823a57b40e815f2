"""An embedding of SDXL means the same here and in PyTorch diffusers, loaded by hand for each encoder."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from tests.parity.common import nchw
from tests.parity.pictures import SCHEDULERS, psnr
from tests.parity.test_embeddings import their_ids
from tests.parity.test_lora import GUIDANCE, LATENTS
from tests.tiny import XL, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS = ["a zzbad at night", "zzbad, a red fox"]
STEPS = 6


def test_same_ids_and_picture_as_in_pytorch(tmp_path):
    folder = tiny_folder(tmp_path / "model", **XL, scheduler=SCHEDULERS["euler"])
    rng = np.random.default_rng(0)
    tables = {
        name: rng.standard_normal((3, width), np.float32) for name, width in (("clip_l", 24), ("clip_g", 20))
    }
    file = tmp_path / "zzbad.safetensors"
    save_file({name: torch.from_numpy(table) for name, table in tables.items()}, file)

    def there():
        start = torch.from_numpy(nchw(LATENTS).copy())
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
        return np.round(pipeline(PROMPTS, latents=start, **options).images * 255)

    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    without, state = there(), load_file(file)
    for name, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(pipeline, part + end) for part in ("tokenizer", "text_encoder")}
        pipeline.load_textual_inversion(state[name], token="zzbad", **parts)
    theirs = there()
    assert psnr(without, theirs) < 25  # the word is seen

    pipe = engine.load(folder, embeddings=[file])
    np.testing.assert_array_equal(pipe.model.tokenizer.encode(PROMPTS), their_ids(pipeline, PROMPTS).numpy())
    ours = pipe.generate(PROMPTS, steps=STEPS, guidance_scale=GUIDANCE, latents=LATENTS)
    assert psnr(ours, theirs) >= 45
