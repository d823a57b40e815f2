"""What draws as in PyTorch diffusers: a row for each pair of a model and a feature, 45 dB or more.

Random weights in float32, the same start latents and noise: tests/parity/pictures.py.
"""

import pathlib

import numpy as np
import pytest

from engine.weights import embeddings, lora_files
from engine.weights.folder import load_folder
from engine.weights.lora import KINDS, XL_KINDS
from tests.long import LONG
from tests.parity.pictures import PROMPTS, How, both, psnr
from tests.tiny import REFINER, THREE_LEVELS, TINY_VAE, XL, shallow

pytestmark = pytest.mark.usefixtures("quick_compiler")

SD, TAESD = {}, {"vae": TINY_VAE}
INPAINTS, FOLLOWS = shallow({"unet": {"in_channels": 9}}), {"unet": {"in_channels": 8}}
LCM = shallow({"unet": {"time_cond_proj_dim": 16}})
PRUNED_SD = {"unet": {"mid_block_type": None}}
XL_INPAINTS = shallow({**XL, "unet": XL["unet"] | {"in_channels": 9}})
XL_FOLLOWS = shallow({**XL, "unet": XL["unet"] | {"in_channels": 8}})
XL_LCM = shallow({**XL, "unet": XL["unet"] | {"time_cond_proj_dim": 16}})
SSD = {
    **XL,
    "unet": XL["unet"]
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, (2,)),
        "reverse_transformer_layers_per_block": ((2, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
        "use_linear_projection": True,
    },
}
XL_ADAPTER = {"channels": (16, 32, 32, 32), "downscale_factor": 4, "adapter_type": "full_adapter_xl"}
# Where the sampler is tested, or what it begins with: most of the time is the compiler's.
LEAST, LEAST_XL, LEAST_REFINER = shallow(SD), shallow(XL), shallow(REFINER)
CHANNELS = {"latents_mean": (-0.4, 0.3, -0.2, 0.5), "latents_std": (0.8, 1.2, 0.7, 1.1)}
PLAYGROUND = shallow({**XL, "vae": CHANNELS})
WORDS, ALONE = How(), How(scale=1.0)
DEEP = {kind: {"num_hidden_layers": 3} for kind in ("text_encoder", "text_encoder_2")}
ONE = "a blue car"  # negative prompt, of both
XL_WORDS = How(negatives=ONE)


def with_lora(scale: float = 1.0):
    """A LoRA of everything that attends."""

    def beside(folder: pathlib.Path):
        from tests.parity.test_lora import ATTENTION, TEXT, random_lora

        parts = load_folder(folder).parts
        kinds = [kind for kind in (XL_KINDS if "text_encoder_2" in parts else KINDS) if kind in parts]
        lora = random_lora({kind: parts[kind].config for kind in kinds}, [*ATTENTION, *TEXT])
        file = lora_files.save(folder.parent / "lora.safetensors", lora)

        def apply(pipeline):
            pipeline.load_lora_weights(file)
            pipeline.fuse_lora(components=kinds, lora_scale=scale)

        return {"lora": [(file, scale)]}, apply

    return beside


def with_word(folder: pathlib.Path):
    """Three vectors for what stands in the first prompt."""
    vectors = np.random.default_rng(3).standard_normal((3, 24), np.float32)
    file = embeddings.save(folder.parent, embeddings.Embedding("fox at", vectors))
    return {"embeddings": [file]}, lambda pipeline: pipeline.load_textual_inversion(folder.parent)


ROWS = {
    # model, feature: (overrides of the tiny model, scheduler, how)
    "SD, words": (SD, "euler", WORDS),
    "SD, guidance in the first steps": (LEAST, "euler", How(guidance_end=0.6)),
    "SD, guidance in the first steps of pndm": (LEAST, "pndm", How(guidance_end=0.6)),
    "SD, guidance that gives contrast back": (LEAST, "ddim, v", How(scale=7.5, guidance_rescale=0.7)),
    "SD, features kept": (SD, "euler", How(cache_interval=3)),
    "SD, features kept by heun": (SD, "heun", How(cache_interval=2)),
    "SD, features kept, guidance in the first steps": (
        SD,
        "pndm",
        How(cache_interval=3, guidance_end=0.6),
    ),
    "SD, perturbed attention": (SD, "euler", How(pag_scale=3.0)),
    "SD, perturbed attention, no other guidance": (SD, "ddim, v", How(scale=1.0, pag_scale=2.0)),
    "SD, perturbed attention, features kept": (SD, "euler", How(pag_scale=3.0, cache_interval=3)),
    "SD, perturbed attention at the end": (SD, "euler", How(pag_scale=2.0, pag_layers="up_blocks.1")),
    "SD, tokens merged": (SD, "euler", How(merge_tokens=0.5)),
    "SD, most tokens merged": (SD, "euler", How(merge_tokens=0.7, size=(24, 40))),
    "SD, two layers less of words": (
        LEAST | {"text_encoder": DEEP["text_encoder"]},
        "euler",
        How(clip_skip=2),
    ),
    "SD, no guidance": (LEAST, "dpmpp_2m", ALONE),
    "SD, pndm": (LEAST, "pndm", WORDS),
    "SD, ddim of v": (LEAST, "ddim, v", WORDS),
    "SD, ddim of x0": (LEAST, "ddim, x0", WORDS),
    "SD, euler of v": (LEAST, "euler, v", WORDS),
    "SD, dpmpp_2m of v": (LEAST, "dpmpp_2m", WORDS),
    "SD, heun": (LEAST, "heun", WORDS),
    "SD, lms": (LEAST, "lms", WORDS),
    "SD, deis": (LEAST, "deis", WORDS),
    "SD, unipc": (LEAST, "unipc", WORDS),
    "SD, dpm_2": (LEAST, "dpm_2", WORDS),
    "SD, img2img by ddim of v": (LEAST, "ddim, v", How(image=True, strength=0.7)),
    "SD, img2img by euler": (LEAST, "euler", How(image=True, strength=0.5)),
    "SD, img2img by dpmpp_2m": (LEAST, "dpmpp_2m", How(image=True, strength=0.8)),
    "SD, drawn over at twice the size, by ddim of v": (LEAST, "ddim, v", How(hires=2, strength=0.7)),
    "SD, drawn over at 1.5 times the size, by euler": (LEAST, "euler", How(hires=1.5, strength=0.5)),
    "SD, a masked part by ddim of v": (LEAST, "ddim, v", How(image=True, mask=True, strength=0.7)),
    "SD, a masked part by euler": (LEAST, "euler", How(image=True, mask=True, strength=0.6)),
    "SD, a masked part by dpmpp_2m": (LEAST, "dpmpp_2m", How(image=True, mask=True, strength=0.9)),
    "SD, LoRA": (SD, "euler", How(beside=with_lora())),
    "SD, half a LoRA": (LEAST, "euler", How(beside=with_lora(0.5))),
    "SD, a word of textual inversion": (LEAST, "euler", How(beside=with_word)),
    "SD, tiles": (SD, "dpmpp_2m", How(scale=1.0, size=(24, 40), tile=16)),
    "SD with TAESD, words": (TAESD, "euler", WORDS),
    "SD without a mid block, words": (PRUNED_SD, "euler", WORDS),
    "SD Turbo, one step": (LEAST, "euler, trailing", How(steps=1, scale=1.0)),
    "SD Lightning, four steps": (LEAST, "euler, trailing", How(steps=4, scale=1.0)),
    "SD Hyper, one step by tcd": (LEAST, "tcd", How(steps=1, scale=1.0)),
    "LCM, guidance in its time": (LCM, "euler", WORDS),
    "LCM, one step by lcm": (LCM, "lcm", How(steps=1)),
    "SD inpainting": (INPAINTS, "ddim, v", How(image=True, mask=True)),
    "SD inpainting, half way": (INPAINTS, "euler", How(image=True, mask=True, strength=0.5)),
    "InstructPix2Pix": (FOLLOWS, "euler", How(image=True)),
    "InstructPix2Pix, features kept": (FOLLOWS, "euler", How(image=True, cache_interval=2)),
    "SD, a ControlNet": (SD, "ddim, v", How(controls=(0.7,))),
    "SD, two ControlNets in part of the steps": (
        SD,
        "euler",
        How(controls=(0.7, 1.2), control_start=0.2, control_end=0.8),
    ),
    "SD, a ControlNet, no guidance": (LEAST, "dpmpp_2m", How(controls=(1.0,), scale=1.0, size=(24, 40))),
    "SD, a ControlNet, features kept": (SD, "euler", How(controls=(0.5,), cache_interval=2)),
    "SD, a ControlNet, perturbed attention": (SD, "euler", How(controls=(0.5,), pag_scale=3.0)),
    "SD, a ControlNet, tokens merged": (SD, "euler", How(controls=(0.5,), merge_tokens=0.5)),
    "SD, a ControlNet, img2img": (LEAST, "euler", How(controls=(1.0,), image=True, strength=0.6)),
    "SD, a ControlNet, a masked part": (
        LEAST,
        "euler",
        How(controls=(1.0,), image=True, mask=True, strength=0.6),
    ),
    "SD, a ControlNet, img2img, in part of the steps": (
        LEAST,
        "euler",
        How(controls=(1.0,), image=True, strength=0.6, control_end=0.5),
    ),
    "SD, a ControlNet, a share that does not divide the steps": (
        LEAST,
        "ddim, v",
        How(controls=(1.0,), control_start=0.15, control_end=0.66),
    ),
    "SD, a T2I-Adapter": (SD, "ddim, v", How(adapters=(0.9,))),
    "SD, two T2I-Adapters, features kept": (
        SD,
        "euler",
        How(adapters=(0.6, 1.2), cache_interval=2, size=(24, 40)),
    ),
    "SD without a mid block, a ControlNet": (PRUNED_SD, "euler", How(controls=(0.7,))),
    "LCM, a ControlNet in part of the steps, features kept": (
        LCM,
        "euler",
        How(controls=(0.7,), control_end=0.6, cache_interval=2),
    ),
    "SSD-1B, a ControlNet": (SSD, "euler", How(negatives=ONE, controls=(0.7,))),
    "SD inpainting, a ControlNet": (INPAINTS, "ddim, v", How(controls=(1.0,), image=True, mask=True)),
    "SDXL, words": (XL, "euler", XL_WORDS),
    "SDXL, no negative prompt": (LEAST_XL, "ddim, v", How(negatives=None)),
    "SDXL, a layer less of words": (LEAST_XL | DEEP, "euler", How(negatives=ONE, clip_skip=1)),
    "SDXL, no guidance": (LEAST_XL, "dpmpp_2m", ALONE),
    "SDXL, perturbed attention, contrast given back": (
        *(XL, "euler"),
        How(negatives=ONE, pag_scale=3.0, guidance_rescale=0.7),
    ),
    "SDXL, img2img": (LEAST_XL, "euler", How(negatives=ONE, image=True, strength=0.6)),
    "SDXL, drawn over at twice the size": (LEAST_XL, "euler", How(negatives=ONE, hires=2, strength=0.6)),
    "SDXL, told other sizes and a crop": (
        LEAST_XL,
        "euler",
        How(negatives=ONE, told=((40, 24), (3, 5), (30, 16), (7, 9))),
    ),
    "SDXL, a masked part": (LEAST_XL, "euler", How(negatives=ONE, image=True, mask=True, strength=0.6)),
    "SDXL, a refiner by euler": (XL, "euler", How(negatives=ONE, refiner=REFINER)),
    "SDXL, a refiner by dpmpp_2m, contrast given back": (
        LEAST_XL,
        "dpmpp_2m",
        How(negatives=ONE, scale=12.0, refiner=LEAST_REFINER, guidance_rescale=0.9),
    ),
    "SDXL, LoRA": (LEAST_XL, "euler", How(negatives=ONE, beside=with_lora())),
    "SDXL, a ControlNet": (XL, "euler", How(negatives=ONE, controls=(0.8,))),
    "SDXL, two ControlNets, img2img": (
        XL,
        "euler",
        How(negatives=ONE, controls=(0.8, 0.3), image=True, strength=0.6),
    ),
    "SDXL, a ControlNet union": (
        LEAST_XL,
        "euler",
        How(negatives=ONE, controls=(0.8,), modes=(1,), control_end=0.7),
    ),
    "SDXL, a ControlNet union that sees two pictures": (
        XL,
        "euler",
        How(negatives=ONE, controls=(0.6, 0.6), modes=(3, 0)),
    ),
    "SDXL inpainting, a ControlNet": (
        XL_INPAINTS,
        "euler",
        How(negatives=ONE, controls=(0.8,), image=True, mask=True),
    ),
    "SDXL, a T2I-Adapter in the first steps": (
        THREE_LEVELS,
        "euler",
        How(negatives=ONE, adapters=(0.8,), adapter=XL_ADAPTER, control_end=0.5),
    ),
    "SDXL with TAESDXL, words": ({**XL, **TAESD}, "euler", XL_WORDS),
    "SDXL Turbo, one step": (LEAST_XL, "euler, trailing", How(steps=1, scale=1.0)),
    "SDXL Lightning, four steps": (LEAST_XL, "euler, trailing", How(steps=4, scale=1.0)),
    "SDXL LCM, guidance in its time": (XL_LCM, "euler", XL_WORDS),
    "SDXL inpainting": (XL_INPAINTS, "euler", How(negatives=ONE, image=True, mask=True)),
    "SDXL inpainting, half way": (
        XL_INPAINTS,
        "ddim, v",
        How(negatives=ONE, image=True, mask=True, strength=0.5),
    ),
    "SDXL, features kept, half way": (
        XL,
        "euler",
        How(negatives=ONE, image=True, strength=0.6, cache_interval=2),
    ),
    "SDXL InstructPix2Pix, contrast given back": (
        XL_FOLLOWS,
        "euler",
        How(negatives=ONE, image=True, guidance_rescale=0.7),
    ),
    "SSD-1B, words": (SSD, "euler", XL_WORDS),
    "Playground 2.5, words": (PLAYGROUND, "edm", XL_WORDS),
    "Playground 2.5, img2img": (PLAYGROUND, "edm", How(negatives=ONE, image=True, strength=0.6)),
    "CosXL, words": (LEAST_XL, "edm, v", XL_WORDS),
    # diffusers' inpainting forgets latents_mean where it encodes, so there is no such row of Playground
    "CosXL, a masked part": (LEAST_XL, "edm, v", How(negatives=ONE, image=True, mask=True, strength=0.6)),
    "SDXL refiner alone, img2img": (LEAST_REFINER, "euler", How(negatives=ONE, image=True, strength=0.6)),
}


# What differs in the sampler alone, which tests/parity/test_schedulers.py holds step by step, or joins what
# other rows have one by one.
ALIKE = (
    *("SD, heun", "SD, lms", "SD, deis", "SD, unipc", "SD, dpm_2", "SD, ddim of x0", "SD, euler of v"),
    *("SD, guidance in the first steps of pndm", "SD, features kept, guidance in the first steps"),
    *("SD, features kept by heun", "SD, most tokens merged", "SD Lightning, four steps"),
    *("SD, a ControlNet, a share that does not divide the steps", "SD without a mid block, a ControlNet"),
    *("LCM, a ControlNet in part of the steps, features kept", "SDXL Lightning, four steps"),
    *("SDXL, features kept, half way", "SDXL inpainting, half way", "InstructPix2Pix, features kept"),
    *(
        "SD, a masked part by dpmpp_2m",
        "SD, img2img by dpmpp_2m",
        "SD, half a LoRA",
        "SD inpainting, half way",
    ),
    *("SD, a ControlNet, img2img, in part of the steps", "SDXL, two ControlNets, img2img"),
    *("SSD-1B, a ControlNet", "SDXL Turbo, one step", "SD, a T2I-Adapter"),
)


@pytest.mark.parametrize("row", [pytest.param(row, marks=LONG) if row in ALIKE else row for row in ROWS])
def test_draws_as_in_diffusers(row, tmp_path):
    ours, theirs = both(tmp_path, *ROWS[row])
    assert theirs.std() > 20  # pictures, not one colour
    assert psnr(ours, theirs) >= 45
    assert psnr(ours[::-1], theirs) < 25  # another picture is told apart
    assert len(ours) == len(PROMPTS)
