"""Models and the arguments of their programs as shapes: what a compiler needs, and no memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike

from engine.conditions import Told
from engine.config import StageConfig, nearest
from engine.config.training import REMATS, ObjectiveConfig
from engine.controls import ControlNet
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.enlarging import Enlarging
from engine.loading import DTYPES, SHIPPED, SHIPPED_NAME
from engine.models.controlnet import Look
from engine.models.upscalers import RRDBConfig
from engine.parallel import Devices
from engine.programs import Programs
from engine.requests import Context
from engine.train import loop, objectives, optim
from engine.train.dry_run import placed
from engine.types import UserError
from engine.way import Kind
from engine.weights import network, quantized, upscaler
from engine.weights.component import Component, abstract
from engine.weights.controlnet import config_for
from engine.weights.folder import TOKENIZERS, Model, load_folder
from engine.weights.index import PARTS, numbers_beside
from engine.weights.random_folder import ARCHITECTURES

SEGMENT = 4  # steps of a scan; compilers count its body once


class Program(NamedTuple):
    """Something to compile: `function.lower(*arguments)`."""

    function: Any
    arguments: tuple
    init: Callable[[Any], Any] | None = None  # of a training: params -> its state


def model(name: str, dtype: DTypeLike = jnp.bfloat16, quantize: str = "") -> Model:
    """The shipped model, one of a known architecture, or that of a folder, with shapes for weights.

    Raises:
      UserError: no such architecture or folder; or an unknown type to quantize to.
    """

    def place(_: str, leaf: Any) -> Any:
        return shape(*leaf.shape, dtype=dtype)

    if quantize:
        place = quantized.placing(place, quantize)
    if name not in ARCHITECTURES:
        return load_folder(SHIPPED if name == SHIPPED_NAME else name, dtype, place=place)
    architecture, parts = ARCHITECTURES[name], dict.fromkeys(PARTS)
    for kind in PARTS:
        if config := getattr(architecture, kind):
            graphdef, found = abstract(kind, config)
            flat = {path: place(".".join(map(str, (kind, *path))), leaf) for path, leaf in found.items()}
            parts[kind] = Component(kind, config, graphdef, traverse_util.unflatten_dict(flat))
    scheduler = SchedulerConfig.from_json(architecture.scheduler, "scheduler")
    return Model(**parts, **dict.fromkeys(TOKENIZERS.values()), scheduler=scheduler)


def shape(*axes: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def split(tree: Any, devices: Devices) -> Any:
    """Shapes of a batch over the devices."""
    return placed(tree, lambda shapes: jax.tree.map(lambda _: devices.batch_sharding, shapes))


def told(model: Model, batch: int, dtype: DTypeLike) -> Told:
    """What the U-Net is told of a batch beside the latents."""
    unet, pooled, numbers = model.unet.config, None, None
    if model.text_encoder_2:
        second = model.text_encoder_2.config
        pooled = shape(batch, second.projection_dim, dtype=dtype)
        numbers = shape(batch, numbers_beside(unet, second, "unet"))
    words = shape(batch, tokens(model), unet.per_block("cross_attention_dim")[0], dtype=dtype)
    return Told(Context(words, pooled), numbers)


def controlnet(model: Model) -> ControlNet:
    """A new one for the model, with shapes for weights."""
    dtype = jax.tree.leaves(model.unet.params["conv_in"])[0].dtype
    config = config_for(model)
    graphdef, found = abstract("controlnet", config)
    flat = {path: shape(*leaf.shape, dtype=dtype) for path, leaf in found.items()}
    params = traverse_util.unflatten_dict(flat)
    return ControlNet(Component("controlnet", config, graphdef, params), 1.0)


def drawing(
    model: Model,
    devices: Devices,
    side: int,
    batch: int,
    sampler: str = "euler",
    merge: float = 0.0,
    controlnets: int = 0,
) -> dict[str, Program]:
    """The programs that draw `batch` pictures a device, with guidance, and one call of the U-Net without.

    Those of the sampler are one step of it each.

    Args:
      merge: share of the tokens that attend together with others.
      controlnets: that go with the sampler.
    """
    nets = [controlnet(model)] * controlnets
    made = Programs(model, devices, "the benchmark", nets=nets)
    dtype = jax.tree.leaves(model.unet.params)[0].dtype
    whole = batch * devices.count
    params = {kind: placed(part.params, devices.shardings) for kind, part in model.parts.items()}
    latents = shape(whole, *latent_shape(model, side))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="threefry2x32"), whole))
    words = told(model, whole, dtype)
    batched = {"cond": words, "uncond": words, "keys": keys, "guidance_scale": shape(whole)}
    shared = {"unet": params["unet"], "sigmas": shape(31), "initial_scale": shape(), "anew": shape()}
    if nets:
        shared["nets"] = tuple(placed(net.part.params, devices.shardings) for net in nets)
        shared["net_scales"] = shape(controlnets)
        first_level = model.unet.config.block_out_channels[0]
        batched["shown"] = (Look(shape(*latents.shape[:3], first_level, dtype=dtype)),) * controlnets

    kind = Kind(sampler, guided=True, merge=merge)
    begin = made.begin_program(kind, True)
    state, read = begin.eval_shape(shared, {**batched, "x": latents})
    texts = {kind: params[kind] for kind in model.parts if kind in TOKENIZERS}
    ids = {kind: shape(whole, tokens(model), dtype=jnp.int32) for kind in texts}
    first = {"first": shape(dtype=jnp.int32)}
    call = devices.map(lambda params, batched: made.denoising.bound(params, merge=merge)(*batched))
    step = made.segment_program(kind, SEGMENT, False)
    return {
        "text": Program(made.texts.program, (texts, split(ids, devices))),
        "unet": Program(call, (params["unet"], split((latents, shape(whole), words), devices))),
        "sampler": Program(step, (shared | first, split({**batched, **read, "state": state}, devices))),
        "decoder": Program(made.decoder_program, (params["vae"], split(latents, devices))),
    }


def enlarging(model: Model, devices: Devices, side: int, batch: int) -> Program:
    """What enlarges `batch` pictures a device four times, by a network of RealESRGAN_x4plus's shape.

    They go one after another: compilers count one.
    """
    config, dtype = RRDBConfig(), jax.tree.leaves(model.unet.params)[0].dtype
    graphdef, found = network.abstract(upscaler.building(config))
    flat = {path: shape(*leaf.shape, dtype=dtype) for path, leaf in found.items()}
    params = traverse_util.unflatten_dict(flat)
    made = Enlarging(network.Network(config, graphdef, params), devices)
    whole = batch * devices.count
    pictures = shape(whole, side, side, 3, dtype=jnp.uint8), shape(whole, dtype=jnp.bool)
    return Program(made.program, (placed(params, devices.shardings), split(pictures, devices)))


def training(
    model: Model, devices: Devices, side: int, batch: int, remat: str = "none", dtype: str = "bfloat16"
) -> Program:
    """One step of training the U-Net on cached latents and contexts, `batch` pictures a device.

    Where the devices have rules, each keeps its part of the state. The params are float32, without averages.

    Raises:
      UserError: an unknown dtype or remat.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("remat", remat, REMATS)):
        if value not in known:
            raise UserError(f"{name}={value!r} is unknown{nearest(value, known)}; write {' or '.join(known)}")
    config = StageConfig(
        steps=1000,
        batch_size=batch * devices.count,
        remat=remat,
        compute_dtype=dtype,
        shard_params=devices.rules is not None,
        ema=(),
    )
    loss = objectives.cached_loss(model.unet.graphdef, model.scheduler, ObjectiveConfig(), 1.0)
    params = jax.tree.map(lambda leaf: shape(*leaf.shape), model.unet.params)
    optimizer = optim.optimizer(config.optim, config.steps)
    devices, init, step = loop.program("benchmark", loss, params, optimizer, config, devices.devices)
    beside = told(model, config.batch_size, jnp.float16)
    words, pooled, numbers = beside.context.words, beside.context.pooled, beside.numbers
    contexts = {"context": words} if pooled is None else {"context": words, "pooled": pooled}
    latents = shape(config.batch_size, *latent_shape(model, side), dtype=jnp.float16)
    batch_shapes = {"mean": latents, **contexts} | ({} if numbers is None else {"sizes": numbers})
    state = placed(jax.eval_shape(init, params), devices.shardings)
    rows = split(batch_shapes, devices)
    empty = {name: shape(*each.shape[1:], dtype=jnp.dtype(dtype)) for name, each in contexts.items()}
    frozen = placed({"empty": empty}, devices.shardings)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    return Program(step, (state, frozen, rows, key), init)


def tokens(model: Model) -> int:
    """Of a text, as the encoders read it."""
    kinds = [kind for kind in TOKENIZERS if kind in model.parts]
    return model.parts[kinds[0]].config.max_position_embeddings


def latent_shape(model: Model, side: int) -> tuple[int, int, int]:
    """Of a picture with this side in pixels; UserError where there is none."""
    vae = model.vae.config
    if side % vae.scale:
        raise UserError(f"side={side}: this model makes multiples of {vae.scale}")
    return side // vae.scale, side // vae.scale, vae.latent_channels
