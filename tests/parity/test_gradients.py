"""The gradients of every training objective against PyTorch's: diffusers' U-Net, schedulers and formulas.

Theirs are written as diffusers' own training scripts write them (train_text_to_image.py; for flows
train_dreambooth_sd3.py), from timesteps; ours start from sigmas. Both see the same latents, noise, timesteps
and words.
"""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from engine.config import ObjectiveConfig
from engine.diffusion.losses import loss_at, sample_eps
from engine.diffusion.schedules import SchedulerConfig, schedule_for
from engine.models.unet import UNet2DConditionModel, UNetConfig
from tests.parity.common import Twin, assert_same, nchw, nhwc, normal
from tests.tiny import UNET, compiled_quickly

TIMESTEPS = np.array([3, 250, 700, 999])  # the last one too
# t = 1 of a flow has no finite sigma; at ours, which is capped, the network is shown 999.999 for their 1000
FLOW_TIMESTEPS = np.array([3, 250, 700, 998])
X0, CONTEXT = normal(4, 4, 8, 8), normal(4, 7, UNET["cross_attention_dim"], seed=1)  # NCHW
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
GAMMA, K = 5.0, 1.0


@pytest.fixture(scope="module")
def twin():
    original = diffusers.UNet2DConditionModel(**UNET)
    config = UNetConfig.from_json(json.loads(original.to_json_string()), "unet/config.json")
    return Twin(lambda rngs: UNet2DConditionModel(config, rngs), original, "unet")


@pytest.fixture(scope="module")
def apply(twin):
    """(params, x, t) -> F, compiled once for all objectives, as is its derivative."""
    with compiled_quickly():
        yield jax.jit(lambda params, x, t: twin.apply(params, x, t, jnp.asarray(CONTEXT)))


def our_loss_and_gradient(apply, params, eps, scheduler, weighting):
    """eps NHWC."""
    schedule = schedule_for(scheduler)
    timesteps = FLOW_TIMESTEPS if scheduler.is_flow else TIMESTEPS
    objective = ObjectiveConfig(weighting=weighting, snr_gamma=GAMMA, p2_k=K, p2_gamma=0.5)

    def loss(params):
        losses = loss_at(
            lambda x, t: apply(params, x, t),
            jnp.asarray(nhwc(X0)),
            jnp.asarray(eps),
            jnp.asarray(schedule.sigmas[timesteps]),
            schedule,
            scheduler.prediction_type,
            objective,
        )
        return losses.mean()

    return jax.value_and_grad(loss)(params)


def their_loss(unet, noise, prediction_type, weighting, **options):
    """train_text_to_image.py, with "sample" besides."""
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, **BETAS, **options)
    x0, timesteps = torch.from_numpy(X0), torch.from_numpy(TIMESTEPS)
    pred = unet(scheduler.add_noise(x0, noise, timesteps), timesteps, torch.from_numpy(CONTEXT)).sample
    velocity = scheduler.get_velocity(x0, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction_type]
    loss = torch.nn.functional.mse_loss(pred, target, reduction="none").mean((1, 2, 3))
    snr = compute_snr(scheduler, timesteps)
    if weighting == "min_snr":
        weights = torch.stack([snr, GAMMA * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        if prediction_type == "epsilon":
            weights = weights / snr
        elif prediction_type == "v_prediction":
            weights = weights / (snr + 1)
        loss = loss * weights
    if weighting == "p2":  # as in the authors' code, of eps
        loss = loss / (K + snr) ** 0.5
    return loss.mean()


def their_flow_loss(unet, noise, weighting):
    """train_dreambooth_sd3.py; with a weighting its `precondition_outputs`, where the loss is that of x0."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    indices = 999 - torch.from_numpy(FLOW_TIMESTEPS)  # theirs fall
    x0, timesteps, sigmas = torch.from_numpy(X0), scheduler.timesteps[indices], scheduler.sigmas[indices]
    sigmas = sigmas.reshape(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * x0 + sigmas * noise
    pred = unet(noisy, timesteps, torch.from_numpy(CONTEXT)).sample
    if weighting == "uniform":
        return torch.mean((pred - (noise - x0)) ** 2)
    snr = ((1.0 - sigmas) / sigmas) ** 2
    return torch.mean(torch.clamp(snr, max=GAMMA) * (pred * (-sigmas) + noisy - x0) ** 2)


def assert_same_gradients(twin, ours, their_loss):
    value, gradient = ours
    twin.original.zero_grad()
    their_loss.backward()
    np.testing.assert_allclose(value, their_loss.item(), rtol=1e-5)
    weights = [parameter.detach().clone() for parameter in twin.original.parameters()]
    with torch.no_grad():
        for parameter in twin.original.parameters():  # the gradients, laid out as the parameters were
            parameter.copy_(parameter.grad)
        theirs = twin.converted()
        for parameter, weight in zip(twin.original.parameters(), weights, strict=True):
            parameter.copy_(weight)
    jax.tree.map_with_path(lambda path, a, b: assert_same(a, b, 1e-4, where=str(path)), gradient, theirs)


NOISE = torch.from_numpy(normal(4, 4, 8, 8, seed=2))
OBJECTIVES = [(kind, w) for kind in ("epsilon", "v_prediction", "sample") for w in ("uniform", "min_snr")]


@pytest.mark.parametrize("prediction_type, weighting", [*OBJECTIVES, ("epsilon", "p2")])
def test_of_noise_image_and_velocity(twin, apply, prediction_type, weighting):
    scheduler = SchedulerConfig("DDPMScheduler", prediction_type=prediction_type, **BETAS)
    ours = our_loss_and_gradient(apply, twin.params, nhwc(NOISE.numpy()), scheduler, weighting)
    assert_same_gradients(twin, ours, their_loss(twin.original, NOISE, prediction_type, weighting))


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_of_a_flow(twin, apply, weighting):
    scheduler = SchedulerConfig("FlowMatchEulerDiscreteScheduler", prediction_type="flow_prediction")
    ours = our_loss_and_gradient(apply, twin.params, nhwc(NOISE.numpy()), scheduler, weighting)
    assert_same_gradients(twin, ours, their_flow_loss(twin.original, NOISE, weighting))


def test_of_velocity_with_zero_terminal_snr(twin, apply):
    zero = {"rescale_betas_zero_snr": True}
    scheduler = SchedulerConfig("DDPMScheduler", prediction_type="v_prediction", **BETAS, **zero)
    ours = our_loss_and_gradient(apply, twin.params, nhwc(NOISE.numpy()), scheduler, "uniform")
    assert_same_gradients(twin, ours, their_loss(twin.original, NOISE, "v_prediction", "uniform", **zero))


def test_with_offset_noise(twin, apply):
    key, x0 = jax.random.key(0), jnp.asarray(nhwc(X0))
    plain, eps = (np.asarray(sample_eps(key, x0, offset)) for offset in (0.0, 0.3))
    constant = torch.from_numpy(nchw(eps - plain)).mean((2, 3), keepdim=True) / 0.3  # their randn(B, C, 1, 1)
    noise = torch.from_numpy(nchw(plain).copy())
    noise += 0.3 * constant
    scheduler = SchedulerConfig("DDPMScheduler", **BETAS)
    ours = our_loss_and_gradient(apply, twin.params, eps, scheduler, "uniform")
    assert_same_gradients(twin, ours, their_loss(twin.original, noise, "epsilon", "uniform"))
