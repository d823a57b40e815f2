"""Trains the probe on fresh renders, and keeps it in a file."""

import functools
import hashlib
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import platformdirs
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from engine import scenes
from engine.evaluate.probe import CELLS, SIZE, Answers, apply, init, load, read, save, truth
from engine.types import Params

STEPS = 2500
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
SEED = 2**32 + 1  # scenes of its own: neither the model's training nor the evaluation draws them
TEST_SEED = 2**32 + 2


class Truth(NamedTuple):
    """What a batch shows: the answers, and maps (B, 2, T) of where each thing is; zeros for none."""

    answers: Answers
    where: np.ndarray


def renders(seed: int, first_index: int, n: int) -> tuple[UInt8[np.ndarray, "B S S 3"], Truth]:
    """Renders first_index .. first_index + n - 1 of `seed`, with the truth about them."""
    images, drawn = np.empty((n, SIZE, SIZE, 3), np.uint8), []
    where = np.zeros((n, 2, CELLS**2), np.float32)
    for i in range(n):
        rng = np.random.Generator(np.random.Philox(key=[seed, first_index + i]))
        scene = scenes.sample_scene(rng)
        images[i], boxes = scenes.draw(scene, SIZE, rng)
        drawn.append(scene)
        where[i, : len(boxes)] = [_spot(box) for box in boxes]
    return images, Truth(truth(drawn), where)


def _spot(box: tuple[int, int, int, int]) -> np.ndarray:
    """A Gaussian over the cells, one cell wide, around the middle of the box; sums to 1."""
    left, top, right, bottom = box
    cells = (np.arange(CELLS) + 0.5) * SIZE / CELLS
    x, y = (cells - (left + right) / 2) * CELLS / SIZE, (cells - (top + bottom) / 2) * CELLS / SIZE
    spot = np.exp(-0.5 * (x[None] ** 2 + y[:, None] ** 2)).ravel()
    return spot / spot.sum()


def soften(images: UInt8[Array, "B S S 3"], key: Key[Array, ""]) -> Float[Array, "B S S 3"]:
    """Blurs, dulls and roughens each picture by amounts of its own, as a decoder may."""
    b, size = images.shape[:2]
    keys = jax.random.split(key, 4)
    amount = [jax.random.uniform(k, (b, 1, 1, 1)) for k in keys[:3]]
    x = images.astype(jnp.float32)
    half = x.reshape(b, size // 2, 2, size // 2, 2, 3).mean((2, 4))
    blurred = jax.image.resize(half, x.shape, "linear")
    x = x + jnp.maximum(1.4 * amount[0] - 0.4, 0) * (blurred - x)
    x = 127.5 + (x - 127.5) * (0.85 + 0.3 * amount[1])
    return x + 14 * amount[2] ** 2 * jax.random.normal(keys[3], x.shape)


@functools.cache
def _optimizer(steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(100, steps // 10 + 1), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-3))


@functools.partial(jax.jit, static_argnames="steps", donate_argnums=(0, 1))
def _step(params, opt_state, images, shown: Truth, key, steps: int):
    def loss(params):
        logits = apply(params, soften(images, key))
        total = optax.softmax_cross_entropy(logits.where, shown.where).mean()
        for question, answer in shown.answers._asdict().items():
            entropy = optax.softmax_cross_entropy_with_integer_labels(getattr(logits, question), answer)
            total += entropy.mean()
        return total

    value, gradient = jax.value_and_grad(loss)(params)
    update, opt_state = _optimizer(steps).update(gradient, opt_state, params)
    return optax.apply_updates(params, update), opt_state, value


def train(steps: int = STEPS, batch_size: int = BATCH_SIZE, seed: int = SEED) -> Params:
    """Weights of a probe trained on `steps * batch_size` renders. Shows its progress."""
    key = jax.random.key(seed % 2**32)
    params = init(key)
    opt_state = _optimizer(steps).init(params)
    with tqdm(range(steps), mininterval=10, desc="training the probe", unit="step") as bar:
        for step in bar:
            images, shown = renders(seed, step * batch_size, batch_size)
            step_key = jax.random.fold_in(key, step)
            params, opt_state, loss = _step(params, opt_state, images, shown, step_key, steps)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}")
    return params


def accuracy(params: Params, n: int = 2000, seed: int = TEST_SEED) -> dict[str, float]:
    """Share of right answers to each question, over `n` renders that no training has seen."""
    images, shown = renders(seed, 0, n)
    right = map(np.equal, shown.answers, read(params, images))
    return {name: float(value.mean()) for name, value in zip(Answers._fields, right, strict=True)}


def trained() -> Params:
    """The probe of this drawn world: from the user's cache folder, trained the first time (minutes)."""
    images, _ = renders(TEST_SEED, 0, 64)
    settings = repr((STEPS, BATCH_SIZE, LEARNING_RATE, scenes.THINGS, scenes.BACKGROUNDS)).encode()
    version = hashlib.sha256(settings + images.tobytes()).hexdigest()[:12]
    path = pathlib.Path(platformdirs.user_cache_dir("fogsculpt")) / f"probe-{version}.safetensors"
    if not path.exists():
        save(train(), path)
    return load(path)
