"""What is minimised: tiny networks learn a few pictures by heart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engine import world
from engine.config import AutoencoderStage, ObjectiveConfig, OptimConfig, StageConfig
from engine.diffusion.losses import diffusion_loss
from engine.diffusion.scheduler_config import FLOW, SchedulerConfig
from engine.diffusion.schedules import schedule_for
from engine.text.tokenizer import train_tokenizer
from engine.train import data, objectives, optim, scaling, stages, step
from engine.types import UserError
from tests.tiny import CAPTIONS, tiny_tokenizer
from tests.train.tiny_run import get_config

KEY = jax.random.key(0, impl="threefry2x32")
WORDS = 150  # steps


@pytest.fixture(scope="module")
def batch():
    """Four pictures of large pixels, each with its caption."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    return {"image": coarse.repeat(8, axis=1).repeat(8, axis=2), "ids": tiny_tokenizer().encode(CAPTIONS)}


SCHEDULER = SchedulerConfig.from_json(get_config().scheduler, "tiny_run")
ZERO_SNR = {"rescale_betas_zero_snr": True}
OBJECTIVES = {
    "eps, min-SNR": (SchedulerConfig("DDPMScheduler"), {"weighting": "min_snr"}),
    "eps, P2, offset noise": (SchedulerConfig("DDPMScheduler"), {"weighting": "p2", "noise_offset": 0.1}),
    "v, zero terminal SNR": (
        SchedulerConfig("DDPMScheduler", prediction_type="v_prediction", **ZERO_SNR),
        {"time_sampling": "uniform"},
    ),
    "v, min-SNR": (SCHEDULER, {"weighting": "min_snr"}),
    "x0": (SchedulerConfig("DDPMScheduler", prediction_type="sample"), {}),
    "x0, P2": (SchedulerConfig("DDPMScheduler", prediction_type="sample"), {"weighting": "p2"}),
    "flow": (SchedulerConfig(FLOW, prediction_type="flow_prediction"), {}),
    "flow, min-SNR": (SchedulerConfig(FLOW, prediction_type="flow_prediction"), {"weighting": "min_snr"}),
}


def denoising(parts, scheduler=SCHEDULER, **objective):
    """The loss of the U-Net, its params and what it keeps frozen."""
    graphdefs = {kind: part.graphdef for kind, part in parts.items()}
    loss = objectives.text_to_image_loss(graphdefs, scheduler, ObjectiveConfig(**objective))
    frozen = {kind: parts[kind].params for kind in ("vae", "text_encoder")}
    return loss, parts["unet"].params, frozen | {"empty_ids": tiny_tokenizer().encode([""])[0]}


def scaled(vae, images):
    """The autoencoder with latents of about unit variance."""
    return dataclasses.replace(vae, params=scaling.in_units_of_pixels(vae, vae.params, images))


def run(loss, params, frozen, batch_at, steps, learning_rate, decay_steps=0):
    """The loss at each step (every step draws other noise), and the state after the last."""
    optimizer = optim.optimizer(OptimConfig(learning_rate, warmup_steps=10, decay_steps=decay_steps), steps)
    config = StageConfig(ema=(0.9,))
    train = jax.jit(step.train_step(loss, optimizer, config), donate_argnums=0)
    state, losses = step.init(params, optimizer, config), []
    for i in range(steps):
        state, metrics = train(state, frozen, batch_at(i), KEY)
        losses.append(metrics["loss"])
    return np.array(losses), state


def test_an_autoencoder_learns_four_pictures(batch):
    vae = stages.components(get_config(), tiny_tokenizer())["vae"]
    loss = objectives.autoencoder_loss(vae.graphdef, AutoencoderStage(kl_weight=1e-4))
    losses, _ = run(loss, vae.params, {}, lambda _: batch, 80, 1e-2)
    assert losses[-10:].mean() < losses[0] / 2


def test_a_u_net_learns_four_pictures(batch):
    parts = stages.components(get_config(), tiny_tokenizer())
    parts["vae"] = scaled(parts["vae"], batch["image"])
    loss, params, frozen = denoising(parts, caption_dropout=0.1)
    losses, state = run(loss, params, frozen, lambda _: batch, 150, 1e-2)
    assert losses[-20:].mean() < losses[:5].mean() / 1.5
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        assert not np.array_equal(before, after)  # nothing is cut off from the loss


@pytest.fixture(scope="module")
def learner(batch):
    """A fresh U-Net as (params, x, t) -> F and an update of its params, compiled once; params; latents."""
    parts = stages.components(get_config(), tiny_tokenizer())
    vae, text = (objectives.applier(parts[k].graphdef)(parts[k].params) for k in ("vae", "text_encoder"))
    latents = vae.encode(objectives.to_float(jnp.asarray(batch["image"]))).mean
    build, context = objectives.applier(parts["unet"].graphdef), text.context(jnp.asarray(batch["ids"]))
    network = jax.jit(lambda params, x, t: build(params)(x, t, context))
    optimizer = optim.optimizer(OptimConfig(1e-2, warmup_steps=0), 1000)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = parts["unet"].params
    return network, update, params, optimizer.init(params), (latents - latents.mean()) / latents.std()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_learned(learner, name):
    """Five draws of noise levels and noise over and over: the sum of their losses must fall."""
    scheduler, options = OBJECTIVES[name]
    schedule, objective = schedule_for(scheduler), ObjectiveConfig(**options)
    network, update, params, state, latents = learner

    @jax.value_and_grad
    def gradient(params, key):
        apply = functools.partial(network, params)
        return diffusion_loss(apply, latents, key, schedule, scheduler.prediction_type, objective)[0].mean()

    losses = []
    for i in range(40):
        loss, grads = gradient(params, jax.random.fold_in(KEY, i % 5))
        params, state = update(params, state, grads)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    assert sum(losses[-5:]) < sum(losses[:5]) / 1.5, losses


def test_eps_of_pure_noise_is_refused():
    parts = stages.components(get_config(), tiny_tokenizer())
    with pytest.raises(UserError, match="cannot learn from pure noise, where rescale_betas_zero_snr ends"):
        denoising(parts, SchedulerConfig("DDPMScheduler", **ZERO_SNR))


def test_a_text_encoder_learns_what_captions_say():
    """Of captions that it did not see."""
    tokenizer = train_tokenizer(world.told(0, 0, 500)[0], 2048, 24, sorted(world.words()))
    config = dataclasses.replace(get_config(), max_tokens=24)
    config.text_encoder.update(hidden_size=32, intermediate_size=64)
    text_encoder = stages.components(config, tokenizer)["text_encoder"]
    params = {"text_encoder": text_encoder.params, "heads": objectives.fresh_heads(32, world.FACTS)}
    batch_at, loss = (
        data.captions_with_facts(0, 64, tokenizer),
        objectives.words_loss(text_encoder.graphdef, world.FACTS),
    )
    _, state = run(loss, params, {}, batch_at, WORDS, 1e-2, decay_steps=50)

    value, unseen = jax.jit(loss), batch_at(WORDS)
    before, after = (value(p, {}, unseen, KEY)[0] for p in (params, state.ema_params["ema_0.9"]))
    np.testing.assert_allclose(before, np.log([*world.FACTS.values()]).sum(), rtol=1e-5)  # it knows nothing
    wrong = value(state.ema_params["ema_0.9"], {}, unseen | {"facts": unseen["facts"][::-1]}, KEY)[0]
    assert after < 0.92 * wrong  # more than what is usual in any scene


@pytest.mark.parametrize("caption_dropout, words_matter", [(0.0, True), (1.0, False)])
def test_captions_are_dropped_as_the_config_says(batch, caption_dropout, words_matter):
    parts = stages.components(get_config(), tiny_tokenizer())
    loss, params, frozen = denoising(parts, caption_dropout=caption_dropout)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # a new U-Net predicts 0 whatever it is told
    loss = jax.jit(loss)
    others = batch | {"ids": batch["ids"][::-1]}
    (before, metrics), (after, _) = (loss(params, frozen, one, KEY) for one in (batch, others))
    assert (before != after) == words_matter
    np.testing.assert_allclose(metrics["loss_by_time"].sum() / len(batch["ids"]), before, rtol=1e-4)
    assert metrics["count_by_time"].sum() == len(batch["ids"])
