"""A model that learns from what a judge says: its pictures, its steps, its prompts, and that it goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import engine
from engine import world
from engine.config import DataConfig, DistillConfig, LoraConfig, PriorConfig, RewardConfig
from engine.diffusion import rewarding
from engine.errors import UserNotice
from engine.train import finetune, judges
from engine.train.rewarding import JUDGE, prompts_at, read_prompts, reward_loss
from engine.types import UserError
from engine.weights.folder import load_trainable
from tests.instruments import tiny_clip

KEY = jax.random.key(0, impl="threefry2x32")
PROBED = RewardConfig(judge="probe", steps=2, trained_steps=1)
STEPS = dataclasses.replace(PROBED, steps=4, trained_steps=2)
LORA = LoraConfig(rank=4, alpha=4.0, targets=("to_q", "to_k", "to_v", "conv1", "conv2"))


@pytest.fixture
def tuning(config):
    def tuning(**options):
        return dataclasses.replace(config("lora", lora=LORA, reward=PROBED, **options), data=DataConfig())

    return tuning


@pytest.fixture
def by_clip(tmp_path):
    """A config's judge and prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("a red car\na blue car\na car on grass\n")
    clip = tiny_clip(tmp_path / "clip")
    return RewardConfig(judge=str(clip), prompts=str(file), steps=2, trained_steps=1)


def greenness(params, pictures, batch, key):
    """Of each picture; and the pictures, to be looked at."""
    return pictures[..., 1].mean((1, 2)) - pictures[..., 0].mean((1, 2)), {"pictures": pictures}


@pytest.fixture(scope="module")
def green(model):
    """A model that learns to draw in green: (its loss of its U-Net's params, their value)."""
    own = load_trainable(model)
    judge = judges.Judge({}, lambda asked: {}, greenness)
    frozen = {kind: part.params for kind, part in own.parts.items() if kind != "unet"}
    frozen |= {"empty_ids": own.tokenizers.encode([""])[0], JUDGE: {}}
    batch = {"ids": own.tokenizers.encode(["a red car", "a blue car"])}
    loss = reward_loss(own, STEPS, judge)
    step = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, frozen, batch, KEY), has_aux=True))
    return lambda params: step(params, batch), own.unet.params


def test_its_pictures_are_those_that_the_model_draws(green, model):
    step, params = green
    (_, told), _ = step(params)
    latents = np.asarray(jax.random.normal(jax.random.split(KEY, 3)[0], (2, 8, 8, 4)))
    how = {"latents": latents, "steps": STEPS.steps, "sampler": "euler", "guidance_scale": 5.0}
    drawn = engine.load(model).generate(["a red car", "a blue car"], **how)
    assert np.abs(np.asarray(told["pictures"]) - drawn).max() < 0.6  # which are rounded
    assert drawn.std() > 10


def test_steps_raise_the_reward(green):
    step, params = green
    rewards = []
    for _ in range(6):
        (_, told), gradient = step(params)
        rewards.append(float(told["reward"]))
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        params = jax.tree.map(lambda p, g: p - g / norm, params, gradient)  # noqa: B023
    assert rewards[-1] > rewards[0] + 5


def test_each_picture_learns_from_a_step_of_each_part():
    which = np.asarray(rewarding.chosen(KEY, 500, 20, 4))
    assert which.shape == (500, 4)
    for part, steps in enumerate(which.T):
        assert set(steps) == set(range(5 * part, 5 * part + 5))
    np.testing.assert_array_equal(rewarding.chosen(KEY, 2, 3, 3), [[0, 1, 2], [0, 1, 2]])


def test_the_gradient_of_a_step_is_what_it_adds():
    """Of a denoiser that says the same whatever it is shown, by which the end moves in a known way."""
    sigmas, x = jnp.array([8.0, 4.0, 1.0, 0.0]), jnp.ones((1, 1, 1, 1))

    def end(D):
        _, states = rewarding.drawn(lambda x, sigma: jnp.zeros_like(x), x, sigmas)
        which = jnp.arange(3)[None]
        return rewarding.steered(lambda x, sigma: D.reshape(x.shape), x, states, sigmas, which).sum()

    np.testing.assert_allclose(jax.grad(end)(jnp.zeros(3)), [1 - 4 / 8, 1 - 1 / 4, 1.0])


def test_prompts_come_once_in_a_round_and_rows_are_the_same_on_any_number_of_hosts(model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a car {letter}" for letter in "abcdef"))
    own, judge = (
        load_trainable(model),
        judges.Judge({}, lambda asked: {"n": np.array(asked.captions)}, greenness),
    )
    how = (RewardConfig(judge="a CLIP", prompts=str(file)), own, judge, 4)
    batches = [prompts_at(*how, 0)(step)["n"].tolist() for step in range(3)]
    seen = [name for batch in batches for name in batch]
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(read_prompts(str(file))) and seen[:6] != seen[6:]
    hosts = [prompts_at(*how, 0, process, 2)(1) for process in (0, 1)]
    assert [name for host in hosts for name in host["n"]] == batches[1]
    np.testing.assert_array_equal(hosts[1]["ids"], prompts_at(*how, 0)(1)["ids"][2:])
    assert prompts_at(*how, 1)(0)["n"].tolist() != batches[0]


def test_the_probe_prefers_what_was_asked_for():
    """Renders of the scenes against those of others; in either order where two stand next to each other."""
    plain = {"background": "meadow", "time": "day", "style": "plain"}
    scenes = [
        world.Scene(things, (None,) * len(things), ("big",) * len(things), count, place, relation, **plain)
        for things, count, place, relation in (
            (("fox", "car"), 1, None, "next to"),
            (("apple",), 3, None, None),
            (("car", "fox"), 1, None, "next to"),
            (("cow",), 1, "left", None),
        )
    ]
    rngs = [np.random.default_rng(i) for i in range(4)]
    pictures = jnp.asarray(world.draw(scenes, rngs, 64)[0], jnp.float32)  # smaller than it sees
    judge = judges.judge(PROBED)
    read = jax.jit(lambda told: judge.verdict(judge.params, pictures, told, KEY)[0])

    def rewards(asked):
        return np.asarray(read(judge.told(judges.Asked([""] * 4, asked))))

    right, others = rewards(scenes), rewards(scenes[1:] + scenes[:1])
    assert (right > others + 5).all()
    turned = rewards([scenes[2], scenes[1], scenes[0], scenes[3]])
    np.testing.assert_allclose(turned, right, rtol=1e-5)


def test_a_run_that_stopped_ends_as_one_that_did_not_and_its_file_draws(tuning, by_clip, model, tmp_path):
    def of(steps):
        return dataclasses.replace(tuning(steps=steps), reward=by_clip)

    whole = finetune.train(of(4), tmp_path / "whole")
    finetune.train(of(2), tmp_path / "parts")
    parts = finetune.train(of(4), tmp_path / "parts")
    one, other = map(load_file, (whole, parts))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    with_it = engine.load(model, lora=[(whole, 1.0)]).generate(["a red car"], seed=1, steps=2)
    assert np.abs(with_it.astype(int) - engine.load(model).generate(["a red car"], seed=1, steps=2)).max() > 0
    with pytest.raises(UserError, match="holds a run with reward="):
        finetune.train(dataclasses.replace(tuning(steps=5), reward=STEPS), tmp_path / "parts")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"reward": RewardConfig("probe", trained_steps=3)},
            "reward.trained_steps=3: write a number that div",
        ),
        ({"reward": RewardConfig("probe", steps=0)}, "reward.steps=0: write a number from 1"),
        ({"reward": RewardConfig("probe", guidance_scale=0.5)}, "reward.guidance_scale=0.5: write a number"),
        ({"reward": RewardConfig("a CLIP")}, "reward.judge='a CLIP' without prompts: write reward.prompts"),
        ({"reward": RewardConfig("probe", "x.txt")}, "reward.prompts='x.txt': it asks for scenes of its own"),
        ({"reward": RewardConfig("nowhere", "x.txt")}, "nowhere is no CLIP: .* there is no such folder"),
        ({"reward": RewardConfig("no.safetensors")}, "there is no probe no.safetensors"),
        ({"what": "controlnet"}, "reward.judge='probe' with what='controlnet': write what='unet' or"),
        ({"data": DataConfig(paths=("x",))}, "reward.judge='probe' and data.paths: .* write data.paths=()"),
        ({"latents": "x"}, "reward.judge='probe' and latents: .* write latents=''"),
        ({"distill": DistillConfig(10)}, "reward.judge='probe' and distill.steps: .* write distill.steps=0"),
        ({"prior": PriorConfig("a car", 2)}, "reward.judge='probe' and prior.num_images: "),
        ({"scheduler": {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}}, "pure noise"),
    ],
)
def test_mistakes_are_one_line(tuning, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        finetune.train(dataclasses.replace(tuning(), **options), tmp_path / "run")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no prompt in it; write at least one row"),
        ('{"prompt": 3}', "reward.prompts: row 0 of .*: prompt=3"),
    ],
)
def test_files_of_prompts_that_are_none(tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(file))


def test_settings_that_do_nothing_are_told_of(tuning, config):
    own = tuning(stage={"weighting": "min_snr"})
    with pytest.warns(
        UserNotice, match="finetune.weighting='min_snr' does nothing with reward.judge='probe'"
    ):
        own.validate()
    with pytest.warns(UserNotice, match="settings of data but its seed do nothing with reward.judge='probe'"):
        dataclasses.replace(own, data=DataConfig(flip=0.5)).validate()
    with pytest.warns(UserNotice, match="settings of reward do nothing without reward.judge"):
        config("lora", reward=RewardConfig(steps=8)).validate()
