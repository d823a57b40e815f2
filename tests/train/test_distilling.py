"""A LoRA that is distilled: what its loss is, that steps lower it, that it goes on, and draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import engine
from engine.config import DistillConfig, LoraConfig, PriorConfig, SamplesConfig
from engine.diffusion import distillation
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.diffusion.schedules import schedule_for
from engine.errors import UserNotice
from engine.train import dry_run, finetune
from engine.types import UserError
from launch import cache

KEY = jax.random.key(0, impl="threefry2x32")
DISTILL = DistillConfig(steps=10, guidance_scale=(2.0, 3.0))
ZERO_SNR = {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
LORA = LoraConfig(rank=4, alpha=4.0, targets=("to_q", "to_k", "to_v", "conv1", "conv2"))


@pytest.fixture
def distilling(config):
    return lambda **options: config("lora", **{"lora": LORA, "distill": DISTILL} | options)


def first_batch(own, task, at):
    return jax.tree.map(jnp.asarray, finetune.batches(own, task, at)(0))


def value(own, task, batch, params=None):
    aim = finetune.objective(own, task)
    loss = jax.jit(lambda params: aim.around(aim.loss)(params, aim.frozen, batch, KEY)[0])
    return loss(task.params if params is None else params)


def test_who_knows_the_end_has_nothing_to_learn():
    """Of a distribution that is one picture: whatever the noise, every step of the teacher's leads there."""
    schedule = schedule_for(SchedulerConfig("DDIMScheduler", beta_schedule="scaled_linear"))
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4, 4, 4), np.float32))

    def known(x, sigma):
        return x0

    losses, sigma = distillation.distillation_loss(known, known, x0, KEY, schedule, 50)
    cleanest = (
        sigma <= distillation.step_ends(schedule, 50)[0][0]
    )  # ends not in the picture but at timestep 0
    assert losses[~cleanest].max() < 1e-3
    others, _ = distillation.distillation_loss(lambda x, sigma: x, known, x0, KEY, schedule, 50)
    assert others[~cleanest].min() > 1e-2
    assert len(np.unique(sigma)) > 20  # of 50


def test_its_own_pictures_at_the_end_of_a_step_are_the_goal_and_no_gradient_goes_there():
    schedule = schedule_for(SchedulerConfig("DDIMScheduler", beta_schedule="scaled_linear"))
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2, 2, 1), np.float32))

    def loss(a, b):
        """a scales what the student says at the beginning of steps, b at their ends."""
        told = iter((b, a))  # the goal is computed first
        return distillation.distillation_loss(
            lambda x, sigma: next(told) * 0.5 * x0, lambda x, sigma: x0, x0, KEY, schedule, 10
        )[0].mean()

    at_begin, at_end = jax.grad(loss, (0, 1))(1.0, 0.5)
    assert abs(at_begin) > 0.01 and at_end == 0


def test_steps_lower_its_loss(distilling, tmp_path):
    own = distilling()
    task = finetune.begin(own)
    batch = first_batch(own, task, tmp_path)
    aim = finetune.objective(own, task)
    step = jax.jit(jax.value_and_grad(lambda params: aim.around(aim.loss)(params, aim.frozen, batch, KEY)[0]))
    params, found = task.params, []
    for _ in range(12):
        loss, gradient = step(params)
        found.append(float(loss))
        params = jax.tree.map(lambda p, g: p - 5 * g, params, gradient)
    assert found[-1] < 0.95 * found[0]


def test_the_teacher_is_the_model_without_the_lora(distilling, tmp_path):
    """Whatever the student has learned: with another guidance the loss is another."""
    own = distilling()
    task = finetune.begin(own)
    batch = first_batch(own, task, tmp_path)
    learned = jax.tree.map(lambda p: p + 0.05, task.params)
    losses = []
    for w in (1.0, 2.0, 8.0):
        guided = distilling(distill=dataclasses.replace(DISTILL, guidance_scale=(w, w)))
        losses.append(float(value(guided, task, batch, learned)))
    assert losses[0] < losses[1] < losses[2]


def test_a_run_that_stopped_ends_as_one_that_did_not_and_its_file_draws(distilling, model, tmp_path):
    samples = SamplesConfig(prompts=("a red car",), every=4, sampler="lcm", steps=2, guidance_scale=1.0)
    whole = finetune.train(distilling(samples=samples), tmp_path / "whole")
    assert (tmp_path / "whole" / "samples" / "00000004.png").exists()
    finetune.train(distilling(steps=2), tmp_path / "parts")
    parts = finetune.train(distilling(steps=4), tmp_path / "parts")
    one, other = map(load_file, (whole, parts))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    how = {"seed": 1, "steps": 2, "sampler": "lcm", "guidance_scale": 1.0}
    with_it = engine.load(model, lora=[(whole, 1.0)]).generate(["a red car"], **how)
    assert np.abs(with_it.astype(int) - engine.load(model).generate(["a red car"], **how)).max() > 0
    with pytest.raises(UserError, match="holds a run with distill="):
        finetune.train(distilling(distill=DistillConfig(), steps=5), tmp_path / "parts")
    assert finetune.train(distilling(), tmp_path / "dry", dry_run.fit) is None


def test_latents_are_distilled_as_the_pictures_that_they_were_made_of(distilling, model, pictures, tmp_path):
    folder = tmp_path / "latents"
    assert cache.main(["--model", str(model), "--data", str(pictures), "--out", str(folder)]) == 0
    own = distilling()
    short = dataclasses.replace(own, data=dataclasses.replace(own.data, paths=()), latents=str(folder))
    found = []
    for each in (own, short):
        task = finetune.begin(each)
        found.append(float(value(each, task, first_batch(each, task, tmp_path))))
    np.testing.assert_allclose(*found, rtol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distill": DistillConfig(steps=-1)}, "distill.steps=-1: write a number from 0"),
        ({"distill": DistillConfig(10, (8.0, 5.0))}, "distill.guidance_scale=.*: write two numbers from 1"),
        ({"distill": DistillConfig(10, (0.5, 5.0))}, "distill.guidance_scale=.*: write two numbers from 1"),
        (
            {"distill": DistillConfig(1001)},
            "distill.steps=1001: write a number that divides 1000, such as 50",
        ),
        ({"distill": DistillConfig(30)}, "distill.steps=30: write a number that divides 1000, such as 50"),
        ({"scheduler": ZERO_SNR}, "prediction_type='epsilon' cannot learn from pure noise"),
        ({"lora": LoraConfig(text_encoder=True)}, "distill.steps=10 and lora.text_encoder: the U-Net alone"),
        (
            {"prior": PriorConfig("a car", 2)},
            "distill.steps=10 and prior.num_images: the model is its own prior",
        ),
        ({"what": "unet"}, "distill.steps=10 with what='unet': write what='lora', or distill.steps=0"),
        (
            {"samples": SamplesConfig(("a car",), every=2, sampler="lmc")},
            "sampler='lmc' is unknown .did you mean lms",
        ),
    ],
)
def test_mistakes_are_one_line(distilling, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        finetune.train(dataclasses.replace(distilling(), **options), tmp_path / "run")


def test_settings_that_do_nothing_are_told_of(distilling):
    own = distilling(stage={"weighting": "min_snr"})
    with pytest.warns(UserNotice, match="finetune.weighting='min_snr' does nothing with distill.steps=10"):
        own.validate()
