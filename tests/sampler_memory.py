"""What drawing takes of a TPU's memory, as its compiler sees it. Needs no TPU, but its compiler:

  pip install libtpu
  python -m tests.sampler_memory --architecture sdxl [--side 1024] [--batch_size 1]

Compiles the programs of a model of random weights, in bfloat16, for one chip of a v5e (16 GB), with
classifier-free guidance; some minutes. Prints for each what it takes beside the weights, which all stay.
"""

import argparse
import math

from tests.tpu_compiler import shapes  # before JAX is imported

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from flax import traverse_util  # isort: skip

from engine.conditions import Told
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.programs import Programs
from engine.requests import Context
from engine.weights.component import Component, abstract
from engine.weights.folder import TOKENIZERS, Model
from engine.weights.index import PARTS, numbers_beside
from engine.weights.random_folder import ARCHITECTURES

ROOM = 16 * 2**30  # bytes of a v5e
TOKENS = 77
SEGMENT = 4  # steps


class Alone:
    """In place of engine.parallel.Devices: programs as they are, for one device."""

    @staticmethod
    def map(f):
        return f


def build(name: str) -> Model:
    """The model, with shapes for weights."""
    architecture, parts = ARCHITECTURES[name], dict.fromkeys(PARTS)
    for kind in PARTS:
        if config := getattr(architecture, kind):
            graphdef, found = abstract(kind, config)
            flat = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in found.items()}
            parts[kind] = Component(kind, config, graphdef, traverse_util.unflatten_dict(flat))
    scheduler = SchedulerConfig.from_json(architecture.scheduler, "scheduler")
    return Model(**parts, **dict.fromkeys(TOKENIZERS.values()), scheduler=scheduler)


def shape(*axes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def programs(model: Model, side: int, batch: int) -> dict[str, tuple]:
    """Name -> the program, and its arguments."""
    made, unet, vae = Programs(model, Alone(), "random"), model.unet.config, model.vae.config
    ids = {kind: shape(batch, TOKENS, dtype=jnp.int32) for kind in model.parts if kind in TOKENIZERS}
    texts = {kind: part.params for kind, part in model.parts.items() if kind in ids}
    latents = shape(batch, side // vae.scale, side // vae.scale, vae.latent_channels)
    pooled = numbers = None
    if model.text_encoder_2:
        second = model.text_encoder_2.config
        pooled = shape(batch, second.projection_dim)
        numbers = shape(batch, numbers_beside(unet, second, "unet"))
    words = shape(batch, TOKENS, unet.per_block("cross_attention_dim")[0], dtype=jnp.bfloat16)
    told = Told(Context(words, pooled), numbers)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="threefry2x32"), batch))
    batched = {"cond": told, "uncond": told, "keys": keys, "guidance_scale": shape(batch)}
    shared = {"unet": model.unet.params, "sigmas": shape(31)} | dict.fromkeys(
        ("initial_scale", "anew"), shape()
    )
    carry = jax.eval_shape(made._begin("euler", True, True), shared, {**batched, "x": latents})
    segment = made._segment("euler", True, SEGMENT, False)
    first = {"first": shape(dtype=jnp.int32)}
    return {
        "text": (made._text, texts, ids),
        "sampler": (segment, shared | first, {**batched, "carry": carry}),
        "decoder": (made._decoder, model.vae.params, latents),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sdxl")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--batch_size", type=int, default=1)
    given = parser.parse_args()
    model = build(given.architecture)
    weights = sum(
        2 * math.prod(leaf.shape) for part in model.parts.values() for leaf in jax.tree.leaves(part.params)
    )
    print(f"weights      {weights / 2**30:6.2f} GiB")
    for name, (program, *arguments) in programs(model, given.side, given.batch_size).items():
        compiled = jax.jit(program).lower(*map(shapes, arguments)).compile()
        memory = compiled.memory_analysis()
        own = sum(
            2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(arguments[0]) if leaf.dtype == jnp.bfloat16
        )
        given_too = max(memory.argument_size_in_bytes - own, 0)  # weights that it does not use are left out
        beside = given_too + memory.output_size_in_bytes
        total = weights + beside + memory.temp_size_in_bytes
        cost = compiled.cost_analysis()
        print(
            f"{name:12} {memory.temp_size_in_bytes / 2**30:6.2f} GiB of temporaries, {beside / 2**30:.2f} of "
            f"arguments; {total / 2**30:.2f} in all, {total / ROOM:.0%} of a v5e; "
            f"{cost['flops'] / 1e12:.2f} TFLOP",
            flush=True,
        )


if __name__ == "__main__":
    main()
