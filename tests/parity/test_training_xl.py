"""The loss of a training of SDXL and its gradients against PyTorch's, as diffusers' scripts write them.

train_text_to_image_sdxl.py and train_dreambooth_lora_sdxl.py: pictures through the autoencoder, captions
through both text encoders, sizes and crops beside them. Both see the same noise at the same timesteps.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from engine.config import ObjectiveConfig
from engine.diffusion.losses import loss_at
from engine.train import objectives
from engine.weights import names
from engine.weights.folder import load_trainable
from tests.parity.common import assert_same, nchw, nhwc, normal
from tests.parity.pictures import SCHEDULERS
from tests.tiny import CAPTIONS, XL, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

TIMESTEPS = np.array([3, 250, 700, 999])
NOISE = normal(4, 4, 8, 8)
SEEN = [[16, 16, 0, 0], [300, 200, 8, 0], [40, 90, 0, 20], [9, 9, 0, 0]]  # original size, crop
SIZES = np.array([[*each, 16, 16] for each in SEEN])
TEXTS = ("text_encoder", "text_encoder_2")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "xl", **XL, scheduler=SCHEDULERS["euler"])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def theirs(folder, images):
    """The loss, and the gradients of U-Net and text encoders by the names of their parameters."""
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    noise, timesteps = torch.from_numpy(NOISE), torch.from_numpy(TIMESTEPS)
    words, pooled = [], None
    for end in ("", "_2"):
        tokenizer, encoder = (getattr(pipeline, part + end) for part in ("tokenizer", "text_encoder"))
        read = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        ids = tokenizer(CAPTIONS, return_tensors="pt", **read).input_ids
        found = encoder(ids, output_hidden_states=True)
        pooled = found[0]
        words.append(found.hidden_states[-2])
    pixels = torch.from_numpy(nchw(images.astype(np.float32) / 127.5 - 1))
    latents = pipeline.vae.encode(pixels).latent_dist.mean.detach() * pipeline.vae.config.scaling_factor
    found = pipeline.unet(
        scheduler.add_noise(latents, noise, timesteps),
        timesteps,
        torch.cat(words, dim=-1),
        added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.from_numpy(SIZES)},
    ).sample
    loss = torch.nn.functional.mse_loss(found, noise)
    loss.backward()
    gradients = {
        kind: {names.canonical(kind, name): p.grad for name, p in getattr(pipeline, kind).named_parameters()}
        for kind in ("unet", *TEXTS)
    }
    return loss.item(), gradients


@pytest.fixture
def fixed_noise(monkeypatch):
    """In place of noise that is drawn, and of its levels."""

    def loss(apply, x0, key, schedule, prediction_type, objective):
        eps, sigma = jnp.asarray(nhwc(NOISE)), jnp.asarray(schedule.sigmas[TIMESTEPS])
        return loss_at(apply, x0, eps, sigma, schedule, prediction_type, objective), sigma

    monkeypatch.setattr(objectives, "diffusion_loss", loss)


def test_loss_and_gradients_are_those_of_pytorch(folder, images, theirs, fixed_noise):
    model, (their_loss, their_gradients) = load_trainable(folder), theirs
    objective = ObjectiveConfig(caption_dropout=0.0)
    loss = objectives.over_parts(
        objectives.text_to_image_loss(model.graphdefs, model.scheduler, objective, model.zeros)
    )
    params = {kind: model.parts[kind].params for kind in ("unet", *TEXTS)}
    frozen = {"vae": model.vae.params, "empty_ids": model.tokenizers.encode([""])[0]}
    batch = {"image": images, "ids": model.tokenizers.encode(CAPTIONS), "sizes": SIZES.astype(np.int32)}
    gradient = jax.jit(jax.value_and_grad(lambda params, frozen, batch: loss(params, frozen, batch, KEY)[0]))
    value, gradients = gradient(params, frozen, batch)
    assert float(value) == pytest.approx(their_loss, rel=1e-4)
    for kind, tree in gradients.items():
        for path, ours in traverse_util.flatten_dict(tree).items():
            name, ours = names.to_key(path), names.to_torch(path, np.asarray(ours))
            theirs = their_gradients[kind].get(name)
            if theirs is None:  # the last layer of the first encoder is not read
                assert not ours.any()
            elif name.endswith("k_proj.bias"):  # the same for all keys, so that a softmax does not see it
                assert max(np.abs(ours).max(), theirs.abs().max()) < 1e-6
            else:
                assert_same(ours, theirs.numpy(), where=f"{kind}.{name}")
    assert np.abs(np.asarray(gradients["unet"]["add_embedding"]["linear_1"]["kernel"])).max() > 0
