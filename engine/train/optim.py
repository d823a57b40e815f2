"""Optimizers, from optax: clipping, a direction, weight decay, the learning rate."""

import re

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from engine.config import OptimConfig
from engine.types import Params

ADAFACTOR_CLIPPING = 1.0
MUON_RMS = 0.2  # of an update per learning rate: that of AdamW's (Liu et al. 2025, equation 4)


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, flat, and a way down to zero over the last `decay_steps` of `steps`."""
    decay = min(config.decay_steps, max(steps - config.warmup_steps, 0))
    if config.decay == "cosine" and decay:
        way_down = optax.cosine_decay_schedule(config.learning_rate, decay)
    else:
        way_down = optax.linear_schedule(config.learning_rate, 0.0, decay)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            way_down,
        ],
        [config.warmup_steps, steps - decay],
    )


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer `config.name` after clipping by the global norm.

    Weight decay is decoupled and goes with the learning rate, whatever the optimizer, as in AdamW (Loshchilov
    & Hutter 2019): params - rate * (direction + weight_decay * params).
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.chain(
            direction(config),
            optax.add_decayed_weights(config.weight_decay, lambda params: decayed(config, params)),
            optax.scale_by_learning_rate(learning_rate(config, steps)),
        ),
    )


def direction(config: OptimConfig) -> optax.GradientTransformation:
    """What of the gradients the learning rate is multiplied with.

    adamw      Kingma & Ba 2015
    adafactor  Shazeer & Stern 2018: a row and a column in place of a matrix of squares, no momentum, and
               the update's root mean square clipped at 1 (section 6); with our learning rate, not its own
    lion       Chen et al. 2023: the sign of a momentum; a learning rate 3 to 10 times smaller than AdamW's
    muon       Jordan et al. 2024: the momentum of a matrix, made orthogonal. Kernels of convolutions are
               matrices of (height * width * in, out); embeddings, norms and biases have Adam with Nesterov's
               momentum. The scale of Liu et al. 2025 lets both share AdamW's learning rate
    """
    if config.name == "adafactor":
        clip = optax.clip_by_block_rms(ADAFACTOR_CLIPPING)
        return optax.chain(optax.scale_by_factored_rms(), clip)
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2)
    if config.name == "muon":
        return muon(
            -1.0,  # the sign of descent comes with the learning rate
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=matrices,
        )
    return optax.scale_by_adam(config.b1, config.b2)


def matrices(params: Params) -> Params:
    """For each parameter that is a matrix of inputs by outputs, its axes; None for the others."""

    def axes(path, leaf):
        is_matrix = leaf.ndim > 1 and not name_of(path).endswith("embedding")
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1) if is_matrix else None

    return jax.tree_util.tree_map_with_path(axes, params)


def decayed(config: OptimConfig, params: Params) -> Params:
    """Whether a parameter is decayed: it has two dimensions or more, and no pattern is found in its name."""

    def is_decayed(path, leaf) -> bool:
        name = name_of(path)
        return leaf.ndim > 1 and not any(re.search(pattern, name) for pattern in config.no_weight_decay)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def name_of(path: jax.tree_util.KeyPath) -> str:
    """The dotted name, as in down_blocks.0.resnets.1.conv1.kernel."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
