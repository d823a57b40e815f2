"""Optimizers, from optax."""

import jax
import optax

from engine.config import OptimConfig
from engine.types import Params


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, flat, linear decay to zero over the last `decay_steps` of `steps`."""
    decay = min(config.decay_steps, max(steps - config.warmup_steps, 0))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, decay),
        ],
        [config.warmup_steps, steps - decay],
    )


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; parameters of one dimension are not decayed."""

    def decayed(params: Params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
