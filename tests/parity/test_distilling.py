"""The loss of a consistency distillation and its gradients against PyTorch's, written as LCM's authors do.

Luo et al. 2023, and train_lcm_distill_lora_sd.py of diffusers: latents that keep their variance, guidance of
predicted pictures and of predicted noise apart, a step of DDIM. Both see the same noise at the same steps.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from engine.config import DistillConfig
from engine.diffusion import distillation
from engine.diffusion.schedules import schedule_for
from engine.train import distilling, objectives
from engine.weights import names
from engine.weights.folder import load_trainable
from tests.parity.common import assert_same, nchw, nhwc, normal
from tests.parity.pictures import SCHEDULERS
from tests.tiny import CAPTIONS, SHALLOW, XL, shallow, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

STEPS, W = 50, 6.5
CHOSEN = np.array([0, 3, 20, 49])  # of the teacher's steps, the cleanest first
NOISE = normal(4, 4, 8, 8)
SIZES = np.array([[16, 16, 0, 0, 16, 16]] * 4)
KEY = jax.random.key(0)
MODELS = {
    "SD, eps": (SHALLOW, "euler"),
    "SD, v": (SHALLOW, "ddim, v"),
    "SDXL": (shallow(XL), "euler"),
}


@pytest.fixture(scope="module", params=MODELS)
def folders(request, tmp_path_factory):
    """Student and teacher: two models of one shape."""
    overrides, scheduler = MODELS[request.param]
    at = tmp_path_factory.mktemp("models")
    options = overrides | {"scheduler": SCHEDULERS[scheduler]}
    return [tiny_folder(at / str(seed), seed=seed, **options) for seed in (0, 1)]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)


def theirs(folders, images):
    """The loss, and the gradients of the student's U-Net."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[0], **is_sd(folders[0]))
    student, vae = pipeline.unet, pipeline.vae
    teacher = diffusers.UNet2DConditionModel.from_pretrained(folders[1], subfolder="unet")
    scheduler = diffusers.DDPMScheduler.from_pretrained(folders[0], subfolder="scheduler")
    alphas_bar, eps_is_told = scheduler.alphas_cumprod, scheduler.config.prediction_type == "epsilon"
    start = 20 * (CHOSEN + 1) - 1
    start, end = torch.from_numpy(start), torch.from_numpy(np.maximum(start - 20, 0))
    pixels = torch.from_numpy(nchw(images.astype(np.float32) / 127.5 - 1))
    latents = vae.encode(pixels).latent_dist.mean.detach() * vae.config.scaling_factor
    words, empty = told(pipeline, CAPTIONS), told(pipeline, [""] * 4)

    def spread(t):
        a = alphas_bar[t].reshape(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def origin_and_noise(unet, x, t, context):
        out, (alpha, sigma) = unet(x, t, **context).sample, spread(t)
        if eps_is_told:
            return (x - sigma * out) / alpha, out
        return alpha * x - sigma * out, alpha * out + sigma * x

    def consistent(unet, x, t, context):
        scaled = 10.0 * t.reshape(-1, 1, 1, 1)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return skip * x + out * origin_and_noise(unet, x, t, context)[0]

    noisy = scheduler.add_noise(latents, torch.from_numpy(NOISE), start)
    with torch.no_grad():
        (x0, noise), (x0_empty, noise_empty) = (
            origin_and_noise(teacher, noisy, start, context) for context in (words, empty)
        )
        w = W - 1  # as they count it
        x0, noise = x0 + w * (x0 - x0_empty), noise + w * (noise - noise_empty)
        alpha, sigma = spread(end)
        goal = consistent(student, alpha * x0 + sigma * noise, end, words)
    c = 0.001
    found = consistent(student, noisy, start, words)
    loss = (torch.sqrt((found - goal) ** 2 + c**2) - c).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}


def is_sd(folder):
    return {} if (folder / "text_encoder_2").is_dir() else {"safety_checker": None}


def told(pipeline, prompts):
    with torch.no_grad():
        if not hasattr(pipeline, "text_encoder_2"):
            words, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
            return {"encoder_hidden_states": words}
        if not any(prompts):  # what force_zeros_for_empty_prompt says
            words, _, pooled, _ = map(torch.zeros_like, pipeline.encode_prompt(prompts, device="cpu"))
        else:
            words, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu")
        added = {"text_embeds": pooled, "time_ids": torch.from_numpy(SIZES)}
        return {"encoder_hidden_states": words, "added_cond_kwargs": added}


def test_loss_and_gradients_are_those_of_pytorch(folders, images, monkeypatch):
    def fixed(student, teacher, x0, key, schedule, steps):
        sigma, sigma_next = (jnp.asarray(ends)[CHOSEN] for ends in distillation.step_ends(schedule, steps))
        x = x0 + sigma[:, None, None, None] * jnp.asarray(nhwc(NOISE))
        return distillation.loss_at(student, teacher, x, sigma, sigma_next, schedule), sigma

    monkeypatch.setattr(distilling, "distillation_loss", fixed)
    student, teacher = map(load_trainable, folders)
    encode = objectives.of_pictures(student.graphdefs, student.zeros)
    config = DistillConfig(steps=STEPS, guidance_scale=(W, W))
    loss = distilling.distilling_loss(student.unet.graphdef, encode, student.scheduler, config)
    frozen = {kind: part.params for kind, part in student.parts.items() if kind != "unet"}
    frozen |= {"empty_ids": student.tokenizers.encode([""])[0], distilling.TEACHER: teacher.unet.params}
    batch = {"image": images, "ids": student.tokenizers.encode(CAPTIONS)}
    if student.text_encoder_2:
        batch["sizes"] = SIZES.astype(np.int32)
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, frozen, batch, KEY)[0]))
    value, gradients = gradient(student.unet.params, batch)
    their_loss, their_gradients = theirs(folders, images)
    assert float(value) == pytest.approx(their_loss, rel=1e-4) and their_loss > 0.05
    for path, ours in traverse_util.flatten_dict(gradients).items():
        name = names.to_key(path)
        assert_same(names.to_torch(path, np.asarray(ours)), their_gradients[name].numpy(), 2e-4, where=name)


def test_the_teachers_steps_are_those_of_ddim(folders):
    """From every 20th of 1000 timesteps to the one before; the last to the cleanest."""
    scheduler = load_trainable(folders[0]).scheduler
    sigmas = np.asarray(schedule_for(scheduler).sigmas)
    begin, end = distillation.step_ends(schedule_for(scheduler), STEPS)
    np.testing.assert_array_equal(begin, sigmas[19::20])
    np.testing.assert_array_equal(end, [sigmas[0], *begin[:-1]])
