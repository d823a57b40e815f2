"""From folders to a pipeline on the devices."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import platformdirs

from engine import edits
from engine.config import GenerateConfig, nearest
from engine.controls import check_modes, gathered
from engine.models.tiles import check_tile
from engine.parallel import Devices
from engine.pipeline import Pipeline
from engine.requests import check_scaled
from engine.text.reading import Reading
from engine.types import UserError
from engine.weights import clip as clips
from engine.weights import ip_adapter as ip_adapters
from engine.weights import network, quantized
from engine.weights import safety_checker as safety
from engine.weights import upscaler as upscalers
from engine.weights.component import Component
from engine.weights.controlnet import load_controlnet, look
from engine.weights.decoder import with_decoder
from engine.weights.folder import Model, load_folder
from engine.weights.refiner import load_refiner
from engine.weights.source import Loras, Source

SHIPPED = pathlib.Path(__file__).parent / "assets" / "scenes-128"
SHIPPED_NAME = GenerateConfig.model  # what pictures say of the model in the package
DTYPES = ("float32", "bfloat16")


def load(
    model: str | os.PathLike | None = None,
    dtype: str = "float32",
    parallel: str | Devices = "shard_map",
    lora: Sequence[tuple[str | os.PathLike, float]] = (),
    embeddings: Sequence[str | os.PathLike] = (),
    decoder: str | os.PathLike | None = None,
    tile: int = 0,
    refiner: str | os.PathLike | None = None,
    quantize: str = "",
    clip_skip: int = 0,
    controlnet: Sequence[tuple[str | os.PathLike, float]] = (),
    prompt_weights: bool = False,
    long_prompts: bool = False,
    upscaler: str | os.PathLike | None = None,
    ip_adapter: Sequence[tuple[str | os.PathLike, float]] = (),
    image_encoder: str | os.PathLike | None = None,
    ip_adapter_layers: Sequence[str] = (),
    safety_checker: str | os.PathLike | None = None,
    control_mode: Sequence[str | int] = (),
    judge: str | os.PathLike | None = None,
) -> Pipeline:
    """Loads a model onto the devices.

    Args:
      model: a folder in the diffusers layout; None for the model in the package.
      dtype: float32 or bfloat16, of params and activations. The sampler is float32 in any case, and on CPUs,
        which have no fast convolution in bfloat16, all arithmetic.
      parallel: "shard_map", "jit" or "pmap" over all local devices, or `Devices` of your own.
      lora: files in the format of diffusers, of kohya's scripts or of LyCORIS, DoRAs among them, each with
        its scale: 1 is as trained. They become part of the weights, so that pictures take no longer.
      embeddings: files of textual inversion, in the format of diffusers or of AUTOMATIC1111; prompts may then
        use their words.
      decoder: the folder of an autoencoder, or of a model, whose autoencoder stands in for the model's own;
        or the safetensors file of one that is built as the model's.
      refiner: the folder of a model for the same latents that goes the last part of the way to a picture.
      quantize: "int8" or "fp8": the U-Nets' kernels in 8 bits (engine.weights.quantized). "": as `dtype`.
      tile: in pixels; larger pictures are decoded in tiles of this side, for less memory. 0: whole.
      clip_skip: layers of the text encoders that are left out at their end, for models that were trained so;
        of negative prompts, too. The refiner reads as it always does.
      controlnet: folders or files of ControlNets or T2I-Adapters of the model, each with a scale of what it
        adds: 1 is as trained. The refiner has none.
      prompt_weights: brackets in prompts are marks, and say how much words count (engine.text.reading).
      long_prompts: prompts longer than the text encoders read are read in parts (likewise), not cut.
      upscaler: the file of a network that enlarges every picture when it is drawn (engine.models.upscalers).
      ip_adapter: files of IP-Adapters, plain, plus or full, each with a scale of what it adds: each reads a
        picture beside the words (engine.models.ip_adapter). The refiner has none.
      image_encoder: the folder of CLIP's image encoder, by which they read. None: image_encoder/ beside the
        file, or where else the originals have it.
      ip_adapter_layers: blocks or layers of the U-Net to which they add something, such as SDXL's
        "up_blocks.0.attentions.1" for the style alone. None: to all.
      safety_checker: the folder of Stable Diffusion 1's safety checker, or of a model that has one: pictures
        in which it finds one of its concepts are held back (engine.models.safety_checker).
      control_mode: for each entry of `controlnet` that is a union, in their order, of which kind its picture
        is: "canny", "depth", ... (engine.config.CONTROL_MODES), or a number. Entries that name the same
        union are one network, which sees their pictures at once.
      judge: the folder of a CLIP, which says how well pictures show their prompts, and chooses the best of
        several (`best_of` of `Pipeline.generate`).

    Raises:
      UserError: the folder or an argument is wrong; the message says what to write instead.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown{nearest(dtype, DTYPES)}; write {' or '.join(DTYPES)}")
    for name, entries in (("lora", lora), ("controlnet", controlnet), ("ip_adapter", ip_adapter)):
        check_scaled(name, entries)
    devices = Devices(parallel) if isinstance(parallel, str) else parallel
    use_compilation_cache()
    folder, place = SHIPPED if model is None else pathlib.Path(model).expanduser(), devices.place
    if quantize:
        if devices.rules is not None:
            raise UserError(f"quantize={quantize!r} where devices split the model: leave it whole")
        place = quantized.placing(place, quantize)
    for path, _ in controlnet:
        look(path)  # before gigabytes are read
    check_modes([path for path, _ in controlnet], control_mode)
    enlarging = upscalers.look(upscaler) if upscaler else None
    if safety_checker:
        safety.look(safety_checker)
    if judge:
        clips.look(judge)
    found = [ip_adapters.look(path) for path, _ in ip_adapter]
    for each in found:
        ip_adapters.check_fits(each, folder)
    encoders = [ip_adapters.find_encoder(each.file, each.config, image_encoder, folder) for each in found]
    readers = list(zip(found, encoders, [float(scale) for _, scale in ip_adapter], strict=True))

    def read(loras: Loras, source: pathlib.Path, vae: Component | None = None) -> Model:
        there = {"vae": vae} if vae else {}
        return load_folder(source, jnp.dtype(dtype), None, place, loras, embeddings, clip_skip, there)

    loaded = read(lora, folder)
    edits.made_for(loaded, str(folder))
    second = load_refiner(loaded, refiner, jnp.dtype(dtype), place) if refiner else None
    nets = gathered(
        controlnet, control_mode, lambda path: load_controlnet(loaded, path, jnp.dtype(dtype), devices.place)
    )
    prompted = ip_adapters.load_adapters(loaded, readers, ip_adapter_layers, jnp.dtype(dtype), devices.place)
    if decoder:
        loaded = with_decoder(loaded, decoder, jnp.dtype(dtype), devices.place)
        second = dataclasses.replace(second, vae=loaded.vae) if second else None
    checker = safety.load_safety_checker(safety_checker, place=devices.place) if safety_checker else None
    clip = clips.load_clip(judge, devices.place) if judge else None
    larger = network.load(enlarging, jnp.dtype(dtype), devices.place) if enlarging else None
    check_tile(tile, loaded.vae.config.scale)
    reading = Reading(prompt_weights, long_prompts)
    name = SHIPPED_NAME if model is None else str(model)
    return Pipeline(
        *(loaded, devices, name, dtype, folder, tile, second, nets, reading),
        upscaler=larger,
        prompted=prompted,
        source=Source(folder, read, not decoder),
        checker=checker,
        judge=clip,
    )


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was already told where.

    Where that folder cannot be written, as in many containers, nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = platformdirs.user_cache_dir("fogsculpt")
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if os.access(folder, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
