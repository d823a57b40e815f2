"""What is minimised: tiny networks learn a few pictures by heart."""

import dataclasses

import jax
import numpy as np
import pytest

from engine import scenes
from engine.config import AutoencoderStage, DiffusionStage, OptimConfig, StageConfig
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.diffusion.schedules import schedule_for
from engine.text.tokenizer import train_tokenizer
from engine.train import data, objectives, optim, stages, step
from tests.tiny import CAPTIONS, tiny_tokenizer
from tests.train.tiny_run import get_config

KEY = jax.random.key(0, impl="threefry2x32")
WORDS = 150  # steps


@pytest.fixture(scope="module")
def batch():
    """Four pictures of large pixels, each with its caption."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    return {"image": coarse.repeat(2, axis=1).repeat(2, axis=2), "ids": tiny_tokenizer().encode(CAPTIONS)}


def denoising(parts, caption_dropout):
    """The loss of the U-Net, its params and what it keeps frozen."""
    scheduler = SchedulerConfig.from_json(get_config().scheduler, "tiny_run")
    loss = objectives.text_to_image_loss(
        *(parts[kind].graphdef for kind in ("unet", "text_encoder", "vae")),
        schedule_for(scheduler),
        scheduler.prediction_type,
        DiffusionStage(caption_dropout=caption_dropout),
    )
    frozen = {kind: parts[kind].params for kind in ("vae", "text_encoder")}
    return loss, parts["unet"].params, frozen | {"empty_ids": tiny_tokenizer().encode([""])[0]}


def scaled(vae, images):
    """The autoencoder with latents of about unit variance."""
    return dataclasses.replace(vae, params=stages.in_units_of_pixels(vae, vae.params, images))


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


def test_a_text_encoder_learns_what_captions_say():
    """Of captions that it did not see."""
    tokenizer = train_tokenizer(scenes.told(0, 0, 500)[0], 1024, 24, sorted(scenes.words()))
    config = dataclasses.replace(get_config(), max_tokens=24)
    config.text_encoder.update(hidden_size=32, intermediate_size=64)
    text_encoder = stages.components(config, tokenizer)["text_encoder"]
    params = {"text_encoder": text_encoder.params, "heads": objectives.fresh_heads(32)}
    batch_at, loss = data.captions_with_facts(0, 64, tokenizer), objectives.words_loss(text_encoder.graphdef)
    _, state = run(loss, params, {}, batch_at, WORDS, 1e-2, decay_steps=50)

    value, unseen = jax.jit(loss), batch_at(WORDS)
    before, after = (value(p, {}, unseen, KEY)[0] for p in (params, state.ema_params["ema_0.9"]))
    np.testing.assert_allclose(before, np.log([*scenes.FACTS.values()]).sum(), rtol=1e-5)  # it knows nothing
    wrong = value(state.ema_params["ema_0.9"], {}, unseen | {"facts": unseen["facts"][::-1]}, KEY)[0]
    assert after < 0.92 * wrong  # more than what is usual in any scene


@pytest.mark.parametrize("caption_dropout, words_matter", [(0.0, True), (1.0, False)])
def test_captions_are_dropped_as_the_config_says(batch, caption_dropout, words_matter):
    parts = stages.components(get_config(), tiny_tokenizer())
    loss, params, frozen = denoising(parts, caption_dropout)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # a new U-Net predicts 0 whatever it is told
    loss = jax.jit(loss)
    others = batch | {"ids": batch["ids"][::-1]}
    values = [float(loss(params, frozen, one, KEY)[0]) for one in (batch, others)]
    assert (values[0] != values[1]) == words_matter
