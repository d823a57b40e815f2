"""Weights and long prompts, against PyTorch: its text encoders read each part, the weights are as their
formula says, and diffusers' pipeline draws with what comes out."""

import diffusers
import numpy as np
import pytest
import torch

import engine
from tests.parity.common import nchw
from tests.parity.pictures import IN_FLOAT32, SCHEDULERS, How, pipeline, psnr, start_noise
from tests.tiny import REFINER, XL, shallow, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

# A prompt, and its parts: pieces and how many times they count.
SHORT = "a (red:1.5) fox [at] night", [[("a", 1), ("red", 1.5), ("fox", 1), ("at", 1 / 1.1), ("night", 1)]]
LONG = (
    "a cat ((above)) a dog BREAK (two green:0.2) trees BREAK a fox",
    [
        [("a cat", 1), ("above", 1.1 * 1.1), ("a dog", 1)],
        [("two green", 0.2), ("trees", 1)],
        [("a fox", 1)],
    ],
)
NEGATIVES = (
    ("a blue (car:-0.5)", [[("a blue", 1), ("car", -0.5)]]),
    ("(a car:0) BREAK grass", [[("a car", 0)], [("grass", 1)]]),
)


def part_said(tokenizer, encoder, part: list, deep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a text encoder says of each token of a part, how many times that counts; of XL, of all."""
    tokens = [(i, w) for text, w in part for i in tokenizer(text, add_special_tokens=False).input_ids]
    ids, padding = (
        [tokenizer.bos_token_id, *(i for i, _ in tokens), tokenizer.eos_token_id],
        tokenizer.pad_token_id,
    )
    missing = tokenizer.model_max_length - len(ids)
    with torch.no_grad():
        states = encoder(torch.tensor([ids + [padding] * missing]), output_hidden_states=True)
    weights = torch.tensor([1, *(w for _, w in tokens), 1, *[1] * missing], dtype=torch.float32)
    return states.hidden_states[-2] if deep else states.last_hidden_state, weights[None, :, None], states[0]


def said(pipe: diffusers.DiffusionPipeline, parts: list) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Words (1, L x parts, D) of all of the parts; of SDXL, the first as a whole."""
    xl = hasattr(pipe, "text_encoder_2")
    readers = [
        (pipe.tokenizer, pipe.text_encoder),
        *([(pipe.tokenizer_2, pipe.text_encoder_2)] if xl else []),
    ]
    words, whole = [], None
    for tokenizer, encoder in readers:
        if encoder is None:  # of the refiner
            continue
        *read, (empty, _, _) = (part_said(tokenizer, encoder, part, deep=xl) for part in [*parts, []])
        words.append(torch.cat([empty + w * (z - empty) for z, w, _ in read], 1))
        whole = read[0][2] if xl else None
    return torch.cat(words, -1), whole


def options_for(pipe, prompt: list, negative: list) -> dict[str, torch.Tensor]:
    """The arguments of the pipeline: both sides as long as the longer one."""
    parts = max(len(prompt), len(negative))
    found = {}
    for side, own in (("", prompt), ("negative_", negative)):
        words, pooled = said(pipe, own + [[]] * (parts - len(own)))
        found[f"{side}prompt_embeds"] = words
        if pooled is not None:
            found[f"{side}pooled_prompt_embeds"] = pooled
    return found


def there(pipe, how: How, index: int, prompt: list, negative: list, **options) -> np.ndarray:
    latents = options.pop("latents", torch.from_numpy(nchw(start_noise(how)).copy())[index : index + 1])
    words = options_for(pipe, prompt, negative)
    steps = {"num_inference_steps": how.steps, "guidance_scale": how.scale}
    pipe.set_progress_bar_config(disable=True)
    kind = "image" if "denoising_start" in options else "latents"
    return pipe(**{kind: latents}, **words, **steps, **{"output_type": "np"} | options).images


def said_plainly(parts: list) -> str:
    """The same words in the same parts, all of them once."""
    return " BREAK ".join(" ".join(text for text, _ in part) for part in parts)


@pytest.mark.parametrize("model", [shallow({}), shallow(XL)], ids=["SD", "SDXL"])
def test_as_in_pytorch(tmp_path, model):
    folder = tiny_folder(tmp_path / "model", **model, scheduler=SCHEDULERS["euler"])
    how, marked = How(steps=4), (SHORT, LONG)
    ours = engine.load(folder, prompt_weights=True, long_prompts=True)
    drawn = {"steps": how.steps, "guidance_scale": how.scale, "latents": start_noise(how)}
    here = ours.generate([text for text, _ in marked], [text for text, _ in NEGATIVES], **drawn)
    theirs = pipeline(folder, model, how)
    for i, ((_, prompt), (_, negative)) in enumerate(zip(marked, NEGATIVES, strict=True)):
        expected = np.round(there(theirs, how, i, prompt, negative, height=16, width=16)[0] * 255)
        assert psnr(here[i], expected) > 45
    plain = engine.load(folder, long_prompts=True).generate(
        *([said_plainly(parts) for _, parts in side] for side in (marked, NEGATIVES)), **drawn
    )
    assert max(map(psnr, here, plain)) < 35  # so that weights are seen to matter


def test_a_refiner_reads_them_too(tmp_path):
    model, scheduler = shallow(XL), SCHEDULERS["euler"]
    folder = tiny_folder(tmp_path / "model", **model, scheduler=scheduler)
    refiner = tiny_folder(tmp_path / "refiner", seed=1, **shallow(REFINER), scheduler=scheduler)
    how, (text, prompt), (away, negative) = How(steps=5), LONG, NEGATIVES[0]
    ours = engine.load(folder, refiner=refiner, prompt_weights=True, long_prompts=True)
    drawn = {"steps": how.steps, "guidance_scale": how.scale, "latents": start_noise(how)[:1]}
    (here,) = ours.generate([text], away, refiner_start=how.start, **drawn)
    base = pipeline(folder, model, how)
    half = there(
        base, how, 0, prompt, negative, height=16, width=16, denoising_end=how.start, output_type="latent"
    )
    second = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, vae=base.vae, **IN_FLOAT32)
    (expected,) = there(second, how, 0, prompt, negative, latents=half, denoising_start=how.start)
    assert psnr(here, np.round(expected * 255)) > 45
