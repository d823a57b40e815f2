"""Tuning by reward: a model learns from what a judge says of the pictures that it draws itself.

No pictures are needed, but prompts. See `engine.diffusion.rewarding` for how the judge's gradient comes to
the weights, and `engine.train.judges` for who judges.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from engine import world
from engine.conditions import Told
from engine.config import ObjectiveConfig, RewardConfig
from engine.diffusion import rewarding
from engine.diffusion.guidance import guided
from engine.diffusion.losses import check_terminal
from engine.diffusion.parameterization import denoiser
from engine.diffusion.schedules import final_scale, for_sampler, initial_scale, schedule_for, sigmas_for
from engine.text.rows import Rejected, read_rows
from engine.train.data import Batch, BatchAt, own_rows
from engine.train.judges import Asked, Judge
from engine.train.objectives import applier, bound, of_captions
from engine.train.step import Loss
from engine.types import Denoise, UserError
from engine.weights.folder import Model

JUDGE = "judge"  # the name of its params, among what is not trained
Ask = Callable[[int, int], Asked]  # (first number, count) -> what is asked for, a pure function
WORLD_SEED = 2**35  # of scenes that no other training and no evaluation asks for


def reward_loss(model: Model, config: RewardConfig, judge: Judge) -> Loss:
    """Minus the mean reward of pictures that are drawn of the batch's prompts, from fresh noise in each step.

    They are those of the sampler "euler" and an empty negative prompt.

    It is one of the U-Net's params. frozen: those of the other networks, JUDGE's, and "empty_ids", see
    `objectives.of_pictures`; batch: see `prompts_at`.

    Raises:
      UserError: the model has no such steps.
    """
    check_terminal(model.scheduler, ObjectiveConfig(time_sampling="uniform"))
    scheduler, scaling = for_sampler(model.scheduler, "euler"), model.vae.config.scaling_factor
    schedule, graphdefs = schedule_for(scheduler), model.graphdefs
    tell = of_captions(graphdefs, model.zeros, model.clip_skip)
    build, build_vae = applier(graphdefs["unet"]), applier(graphdefs["vae"])
    levels = sigmas_for(scheduler, config.steps, xl=model.text_encoder_2 is not None)
    begin, end, sigmas = initial_scale(scheduler, levels), final_scale(scheduler, levels), jnp.asarray(levels)
    height, width = (side // model.vae.config.scale for side in model.default_size)

    def denoise(params, told: Told, empty: Told) -> Denoise:
        both = guided(bound(build(params)), told, empty, config.guidance_scale)
        return denoiser(both, scheduler.prediction_type, schedule)

    def loss(params, frozen, batch, key):
        noise_key, step_key, judge_key = jax.random.split(key, 3)
        rows = len(batch["ids"])
        told, empty = (tell(frozen, batch, jnp.full(rows, left_out)) for left_out in (False, True))
        x = begin * jax.random.normal(noise_key, (rows, height, width, model.vae.config.latent_channels))
        fixed = jax.lax.stop_gradient((params, told, empty))
        x0, states = rewarding.drawn(denoise(*fixed), x, sigmas)
        which = rewarding.chosen(step_key, rows, config.steps, config.trained_steps)
        again = jax.tree.map(lambda x: jnp.repeat(x, config.trained_steps, 0), (told, empty))
        x0 = rewarding.steered(denoise(params, *again), x0, states, sigmas, which)
        pictures = build_vae(frozen["vae"]).decode(end * x0 / scaling)
        levels = 127.5 + 127.5 * jnp.clip(pictures.astype(jnp.float32), -1, 1)
        rewards, metrics = judge.verdict(frozen[JUDGE], levels, batch, judge_key)
        return -rewards.mean(), {"reward": rewards.mean(), **metrics}

    return loss


def prompts_at(
    config: RewardConfig,
    model: Model,
    judge: Judge,
    batch_size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> BatchAt:
    """step -> {"ids": as in `training_batches`, "sizes" of SDXL, and what the judge is told}

    The prompts of a file come in another order in every round; the drawn world has new scenes in every step.

    Args:
      batch_size: of all hosts together; each makes its part.

    Raises:
      UserError: the file cannot be read, or a row of it is no prompt.
    """
    first, share = own_rows(batch_size, process, processes)
    ask = _scenes(seed) if judge.of_world else _prompts(config.prompts, seed)
    height, width = model.default_size
    sizes = np.array([[height, width, 0, 0, height, width]] * share, np.int32)

    def batch_at(step: int) -> Batch:
        asked = ask(step * batch_size + first, share)
        batch = {"ids": model.tokenizers.encode(asked.captions), **judge.told(asked)}
        return {**batch, "sizes": sizes} if model.text_encoder_2 is not None else batch

    return batch_at


def _scenes(seed: int) -> Ask:
    def ask(first: int, count: int) -> Asked:
        return Asked(*world.told(WORLD_SEED + seed, first, count))

    return ask


def _prompts(path: str, seed: int) -> Ask:
    prompts = read_prompts(path)

    @functools.lru_cache(2)
    def order(round: int) -> np.ndarray:
        return np.random.default_rng([seed, round]).permutation(len(prompts))

    def ask(first: int, count: int) -> Asked:
        places = (divmod(number, len(prompts)) for number in range(first, first + count))
        return Asked([prompts[order(round)[place]] for round, place in places])

    return ask


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, as launch.generate takes it; what else its rows say is for drawing.

    Raises:
      UserError: the file cannot be read, has no rows, or one that is no prompt.
    """
    with read_rows(pathlib.Path(path).expanduser(), None) as rows:
        for row in rows:
            if isinstance(row, Rejected):
                raise UserError(f"reward.prompts: row {row.number} of {path}: {row.reason}")
        return [row.prompt for row in rows]
