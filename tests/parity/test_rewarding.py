"""The reward of a drawn picture and its gradient in the U-Net against PyTorch's, taken through its own steps.

Wu et al. 2024 (DRTune): what the U-Net is shown is detached, and some of the steps are trained.
"""

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from transformers import CLIPModel, CLIPTokenizer

from engine.config import RewardConfig
from engine.diffusion import rewarding
from engine.train import judges
from engine.train.rewarding import JUDGE, reward_loss
from engine.weights import names
from engine.weights.folder import load_trainable
from tests.instruments import tiny_clip
from tests.parity.common import assert_same, nchw
from tests.parity.pictures import SCHEDULERS
from tests.parity.test_distilling import is_sd, told
from tests.tiny import CAPTIONS, SHALLOW, XL, shallow, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

CONFIG = RewardConfig(judge="a CLIP", prompts="of the test", steps=4, trained_steps=2, guidance_scale=3.0)
KEY = jax.random.key(0, impl="threefry2x32")
MODELS = {"SD, v": (SHALLOW, "euler, v"), "SDXL, eps": (shallow(XL), "euler")}
MEAN, STD = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    overrides, scheduler = MODELS[request.param]
    return tiny_folder(
        tmp_path_factory.mktemp("models") / "tiny", **overrides | {"scheduler": SCHEDULERS[scheduler]}
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def theirs(folder, clip, noise, which):
    """The mean reward, and the gradients of the U-Net. which (B, K): the trained steps of each picture."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **is_sd(folder))
    scheduler, unet, vae = pipeline.scheduler, pipeline.unet, pipeline.vae
    scheduler.set_timesteps(CONFIG.steps)
    words, empty = told(pipeline, CAPTIONS), told(pipeline, [""] * 4)
    x = scheduler.init_noise_sigma * torch.from_numpy(nchw(noise))
    for step, (t, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas, strict=False)):
        seen, root = x.detach(), (1 + sigma**2) ** 0.5
        guided = [unet(seen / root, t, **each).sample for each in (empty, words)]
        out = guided[0] + CONFIG.guidance_scale * (guided[1] - guided[0])
        v = scheduler.config.prediction_type == "v_prediction"
        eps = out / root + sigma * seen / root**2 if v else out
        share = CONFIG.steps / CONFIG.trained_steps * torch.from_numpy((which == step).any(1))
        eps = eps.detach() + share.reshape(-1, 1, 1, 1) * (eps - eps.detach())
        x = x + (scheduler.sigmas[step + 1] - sigma) * eps
    pixels = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1) / 2 + 0.5
    pixels = torch.nn.functional.interpolate(pixels, (20, 20), mode="bicubic", antialias=True)
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    model, tokenizer = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    found = model(input_ids=ids, pixel_values=pixels)
    reward = 100 * (found.image_embeds * found.text_embeds).sum(-1).mean()
    (-reward).backward()
    return reward.item(), {name: p.grad for name, p in unet.named_parameters()}


def test_reward_and_gradients_are_those_of_pytorch(folder, clip):
    model = load_trainable(folder)
    judge = judges.judge(RewardConfig(judge=str(clip)))
    frozen = {kind: part.params for kind, part in model.parts.items() if kind != "unet"}
    frozen |= {"empty_ids": model.tokenizers.encode([""])[0], JUDGE: judge.params}
    batch = {"ids": model.tokenizers.encode(CAPTIONS), **judge.told(judges.Asked(CAPTIONS))}
    if model.text_encoder_2 is not None:
        batch["sizes"] = np.array([[16, 16, 0, 0, 16, 16]] * 4, np.int32)
    loss = reward_loss(model, CONFIG, judge)
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, frozen, batch, KEY), has_aux=True))
    gradients, metrics = gradient(model.unet.params, batch)
    noise_key, step_key, _ = jax.random.split(KEY, 3)
    noise = np.asarray(jax.random.normal(noise_key, (4, 8, 8, 4)))
    which = np.asarray(rewarding.chosen(step_key, 4, CONFIG.steps, CONFIG.trained_steps))
    their_reward, their_gradients = theirs(folder, clip, noise, which)
    assert float(metrics["reward"]) == pytest.approx(their_reward, rel=1e-4)
    for path, ours in traverse_util.flatten_dict(gradients).items():
        name = names.to_key(path)
        assert_same(names.to_torch(path, np.asarray(ours)), their_gradients[name].numpy(), 2e-4, where=name)
