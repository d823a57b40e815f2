"""What remat costs and saves, as the compiler for TPUs sees it. Needs no TPU, but its compiler:

  pip install libtpu
  python -m tests.train.remat_memory [--batch_size 32]

Compiles a bfloat16 training step of the U-Net in the package, on cached latents, for one chip of a v5e, with
each remat; some minutes. Prints temporaries, arithmetic and bytes, and the ratios to remat=none.
"""

import argparse
from typing import Any, NamedTuple

from engine.benchmark import tpu_compiler

tpu_compiler.prepare()  # before JAX is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from engine.config import FinetuneConfig, StageConfig  # noqa: E402
from engine.config.training import REMATS  # noqa: E402
from engine.train import finetune, objectives, optim, step  # noqa: E402

CHIP = jax.sharding.SingleDeviceSharding(tpu_compiler.chips("v5e:2x2")[0])


class Cost(NamedTuple):
    temporaries: float  # bytes
    arithmetic: float  # FLOP
    accessed: float  # bytes


def shapes(tree: Any) -> Any:
    """Arrays or their shapes as shapes on one chip of a v5e."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=CHIP), tree)


def cost(remat: str, batch_size: int) -> Cost:
    """Of one step; nothing is computed."""
    config = FinetuneConfig()
    task = finetune.begin(config)
    model = task.model
    loss = objectives.cached_loss(model.unet.graphdef, model.scheduler, config.finetune, 1.0)
    stage = StageConfig(steps=10, batch_size=batch_size, remat=remat, compute_dtype="bfloat16")
    optimizer = optim.optimizer(stage.optim, stage.steps)
    state = jax.eval_shape(lambda params: step.init(params, optimizer, stage), task.params)
    words = (model.tokenizer.model_max_length, model.text_encoder.config.hidden_size)
    side, channels = model.unet.config.sample_size, model.vae.config.latent_channels
    frozen = {"empty": {"context": jax.ShapeDtypeStruct(words, jnp.float32)}}
    batch = {
        "mean": jax.ShapeDtypeStruct((batch_size, side, side, channels), jnp.float16),
        "context": jax.ShapeDtypeStruct((batch_size, *words), jnp.float16),
    }
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    train_step = step.train_step(objectives.over_parts(loss), optimizer, stage)
    arguments = map(shapes, (state, frozen, batch, key))
    compiled = jax.jit(train_step, donate_argnums=0).lower(*arguments).compile()
    counted = compiled.cost_analysis()
    return Cost(compiled.memory_analysis().temp_size_in_bytes, counted["flops"], counted["bytes accessed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    given = parser.parse_args()
    print(f"{'remat':8}  {'temporaries':>20}  {'arithmetic':>18}  {'accessed':>17}")
    plain = None
    for remat in REMATS:
        found = cost(remat, given.batch_size)
        plain = plain or found
        ratio = Cost(*(a / b for a, b in zip(found, plain, strict=True)))
        print(
            f"{remat:8}  {found.temporaries / 2**20:7.1f} MiB ({ratio.temporaries:.2f})  "
            f"{found.arithmetic / 1e12:6.3f} TFLOP ({ratio.arithmetic:.2f})  "
            f"{found.accessed / 1e9:5.2f} GB ({ratio.accessed:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
