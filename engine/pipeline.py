"""The whole way of one picture: words, noise, steps, picture.

Three compiled stages (and a few lines that draw the noise), each mapped over all devices; a fourth, where
there are pictures to change, makes latents of them (`engine.edits`):

  text     ids -> context vectors, once for each distinct prompt
  sampler  noise -> latents, a scan over the steps, run in segments so that one can see how far it is
  decoder  latents -> uint8 pictures

Params, contexts, keys, guidance scale and sigmas are arguments: another prompt, seed or scale compiles
nothing. Sizes, the number of steps, the sampler and whether there is guidance at all are static.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
from flax import nnx
from jaxtyping import Float, UInt8

from engine import conditions, edits
from engine.config import GenerateConfig, nearest
from engine.diffusion import guidance, noise, samplers, schedules
from engine.diffusion.parameterization import denoiser
from engine.diffusion.scheduler_config import for_sampler, sampler_name
from engine.diffusion.segments import chosen_stages, segment_length
from engine.finish import to_uint8
from engine.models.tiles import check_tile, decode_in_tiles
from engine.parallel import Devices, pad
from engine.requests import Batch, Context, Edit, Frames, Request, Settings
from engine.text.prompts import check_negative_prompts, check_prompts
from engine.types import Denoise, UserError
from engine.weights.component import Component
from engine.weights.decoder import with_decoder
from engine.weights.folder import Model, load_folder

SHIPPED = pathlib.Path(__file__).parent / "assets" / "scenes-128"
SHIPPED_NAME = GenerateConfig.model  # what pictures say of the model in the package
DTYPES = ("float32", "bfloat16")
MAX_SIDE = 16384
DEFAULT_STEPS = GenerateConfig.steps
DEFAULT_GUIDANCE = GenerateConfig.guidance_scale


def load(
    model: str | os.PathLike | None = None,
    dtype: str = "float32",
    parallel: str | Devices = "shard_map",
    lora: Sequence[tuple[str | os.PathLike, float]] = (),
    embeddings: Sequence[str | os.PathLike] = (),
    decoder: str | os.PathLike | None = None,
    tile: int = 0,
) -> "Pipeline":
    """Loads a model onto the devices.

    Args:
      model: a folder in the diffusers layout; None for the model in the package.
      dtype: float32 or bfloat16, of params and activations. The sampler is float32 in any case.
      parallel: "shard_map", "jit" or "pmap" over all local devices, or `Devices` of your own.
      lora: files in the format of diffusers or of kohya's scripts, each with its scale: 1 is as trained. They
        become part of the weights, so that pictures take no longer.
      embeddings: files of textual inversion, in the format of diffusers or of AUTOMATIC1111; prompts may then
        use their words.
      decoder: the folder of an autoencoder, or of a model, whose autoencoder stands in for the model's own.
      tile: in pixels; larger pictures are decoded in tiles of this side, for less memory. 0: whole.

    Raises:
      UserError: the folder or an argument is wrong; the message says what to write instead.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown{nearest(dtype, DTYPES)}; write {' or '.join(DTYPES)}")
    devices = Devices(parallel) if isinstance(parallel, str) else parallel
    use_compilation_cache()
    folder = SHIPPED if model is None else pathlib.Path(model)
    loaded = load_folder(folder, dtype=jnp.dtype(dtype), place=devices.place, loras=lora, words=embeddings)
    edits.made_for(loaded, str(folder))
    if decoder:
        loaded = with_decoder(loaded, decoder, jnp.dtype(dtype), devices.place)
    check_tile(tile, loaded.vae.config.scale)
    return Pipeline(loaded, devices, SHIPPED_NAME if model is None else str(model), dtype, folder, tile)


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


def module(part: Component, params: Any) -> nnx.Module:
    """The module of a part of the model around (traced) params."""
    return nnx.merge(part.graphdef, nnx.State(params))


class Pipeline:
    """A loaded model, ready to draw. Stages are compiled when they are first needed, and kept."""

    def __init__(
        self, model: Model, devices: Devices, name: str, dtype: str, folder: pathlib.Path, tile: int = 0
    ):
        self.model, self.devices, self.name, self.dtype = model, devices, name, dtype
        self.tile = tile  # side in pixels, for the decoder; 0: none
        self.folder = folder  # from which the model was loaded
        self.distilled = model.unet.config.time_cond_proj_dim is not None  # it knows what guidance does
        self.made_for = edits.made_for(model, name)
        self._text = devices.map(self._encode)
        self._decoder = devices.map(self._decode)
        self._look = devices.map(self._looked_at)
        self._paste = devices.map(lambda _, batched: edits.pasted(*batched))
        self._begin = functools.cache(self._build_begin)
        self._segment = functools.cache(self._build_segment)
        self._noise = functools.cache(self._build_noise)

    # ---- what people call

    def generate(
        self,
        prompts: Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        seed: int | None = None,
        first_index: int = 0,
        steps: int = DEFAULT_STEPS,
        sampler: str | None = None,
        guidance_scale: float = DEFAULT_GUIDANCE,
        height: int | None = None,
        width: int | None = None,
        latents: Float[np.ndarray, "B h w C"] | None = None,
        batch_size: int | None = None,
        given: Sequence[Edit] | None = None,
        strength: float | None = None,
        image_guidance_scale: float = GenerateConfig.image_guidance_scale,
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """One picture for each prompt.

        Args:
          negative_prompts: what to steer away from: one for all, or one for each.
          seed: with `first_index` it addresses the noise: picture i has the index first_index + i, and
            looks the same however many are drawn beside it. None draws a fresh seed.
          sampler: a name of engine.diffusion.samplers.SAMPLERS; None: the one that the model's folder names.
          guidance_scale: 1 leaves out the unconditional pass.
          height, width: in pixels; None: the size that the model was trained for.
          latents: start noise of unit variance, in place of the seed's.
          batch_size: pictures a device draws at once; None: all of them.
          given: pictures to change, one for each prompt: all with a mask or all without, see `engine.edits`.
          strength: 0 to 1, how much of a given picture is forgotten; None: 0.8, and 1 with a mask.
          image_guidance_scale: how strictly a model that changes pictures as it is told keeps to the given
            one, where guidance_scale is not 1.

        Raises:
          UserError: an argument is wrong.
          FloatingPointError: a NaN struck a picture; it says which.
        """
        if batch_size is None:
            batch_size = self.share_of(len(prompts))
        if strength is None:
            strength = edits.default_strength(given[0] if given else None, self.made_for)
        settings = self.settings(steps, sampler, guidance_scale, height, width, batch_size, strength)
        seed = noise.fresh_seed() if seed is None else seed
        images = []
        for batch in self.stream(
            prompts,
            negative_prompts,
            settings,
            seed=seed,
            first_index=first_index,
            latents=latents,
            given=given,
            image_guidance_scale=image_guidance_scale,
        ):
            if batch.spoilt:
                struck = [first_index + batch.first + i for i in batch.spoilt]
                raise FloatingPointError(f"NaN or infinity in the latents of index {struck} of seed {seed}")
            images.append(batch.images)
        return np.concatenate(images)

    def stream(
        self,
        prompts: Sequence[str],
        negative_prompts: str | Sequence[str] | None,
        settings: Settings,
        *,
        seed: int,
        first_index: int = 0,
        latents: Float[np.ndarray, "B h w C"] | None = None,
        frames: int = 0,
        progress: Callable[[int], None] | None = None,
        given: Sequence[Edit] | None = None,
        image_guidance_scale: float = GenerateConfig.image_guidance_scale,
    ) -> Iterator[Batch]:
        """The same, batch by batch as they are done.

        Args:
          frames: how many stages from static to picture to keep of each picture.
          progress: called after each segment with the number of sampling steps it took.
        """
        prompts = check_prompts(prompts)
        negatives = check_negative_prompts(negative_prompts, len(prompts))
        latents = self._check_latents(latents, len(prompts), settings)
        if given is not None and len(given) != len(prompts):
            raise UserError(f"{len(given)} pictures for {len(prompts)} prompts: give one for each")
        edits.checked(given, self.made_for, settings)
        contexts = self.encode([*prompts, *negatives], settings.batch_size)
        indices = range(first_index, first_index + len(prompts))
        requests = [
            Request(prompt, negative, seed, index, settings.guidance_scale, edit, image_guidance_scale)
            for prompt, negative, index, edit in zip(
                prompts, negatives, indices, [None] * len(prompts) if given is None else given, strict=True
            )
        ]
        size = settings.batch_size * self.devices.count
        for first in range(0, len(prompts), size):
            rows = slice(first, first + size)
            start = None if latents is None else latents[rows]
            images, finite, kept = self._draw(requests[rows], contexts, settings, start, frames, progress)
            count = len(requests[rows])
            spoilt = np.flatnonzero(~np.asarray(finite)[:count]).tolist()
            if kept is not None:
                kept = Frames(kept.noisy[:count], kept.denoised[:count])
            yield Batch(first, np.asarray(images)[:count], spoilt, kept)

    def encode(self, prompts: Sequence[str], batch_size: int) -> dict[str, Context]:
        """The context of each distinct prompt, computed in batches of one size."""
        distinct = list(dict.fromkeys(prompts))
        ids, params = conditions.ids_of(self.model, distinct), conditions.params_of(self.model)
        size, found = batch_size * self.devices.count, {}
        for first in range(0, len(distinct), size):
            rows = {kind: pad(each[first : first + size], size) for kind, each in ids.items()}
            batch = self.devices.fetch(self._text(params, self.devices.shard_batch(rows)))
            for i, prompt in enumerate(distinct[first : first + size]):
                found[prompt] = jax.tree.map(lambda array, i=i: array[i], batch)
        return found

    def dispatch(
        self, requests: Sequence[Request], contexts: Mapping[str, Context], settings: Settings
    ) -> tuple[jax.Array, jax.Array]:
        """Sets the devices to work on one batch, and returns while they are at it.

        Args:
          requests: at most batch_size x devices; each has its own seed, index and guidance scale.
          contexts: from `encode`, of all prompts and negative prompts.
          settings: its guidance_scale says by being 1 or not whether there is an unconditional pass.

        Returns:
          Pictures (uint8, B H W 3) and which of them are finite (B,), of a whole batch: what lies behind the
          last request only fills it. np.asarray waits for them.
        """
        if requests[0].edit is None:
            edits.checked(None, self.made_for, settings)
        images, finite, _ = self._draw(requests, contexts, settings)
        return images, finite

    def settings(
        self,
        steps: int = DEFAULT_STEPS,
        sampler: str | None = None,
        guidance_scale: float = DEFAULT_GUIDANCE,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        strength: float = 1.0,
    ) -> Settings:
        """Checks settings, and fills in what the model knows; raises UserError before anything compiles."""
        default_height, default_width = self.default_size
        settings = Settings(
            steps,
            sampler or sampler_name(self.model.scheduler),
            float(guidance_scale),
            default_height if height is None else height,
            default_width if width is None else width,
            batch_size,
            strength,
        )
        samplers.find(settings.sampler)
        schedules.sigmas_for(for_sampler(self.model.scheduler, settings.sampler), steps)
        edits.check_strength(settings)
        if not np.isfinite(settings.guidance_scale):
            raise UserError(f"guidance_scale={guidance_scale} is no number; 1 is none, 5 to 8 are usual")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: write 1 or more")
        scale = self.model.vae.config.scale
        for name, side in (("height", settings.height), ("width", settings.width)):
            if side % scale or not scale <= side <= MAX_SIDE:
                good = min(max(round(side / scale), 1) * scale, MAX_SIDE)
                raise UserError(f"{name}={side}: this model makes multiples of {scale}; write {good}")
        return settings

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained for."""
        return self.model.default_size

    def share_of(self, count: int) -> int:
        """Pictures a device where `count` are spread over all devices at once."""
        return max(1, -(-count // self.devices.count))

    # ---- the stages, on all devices; (shared, batched) -> batched

    def _encode(self, params: Any, ids: Any) -> Any:
        return conditions.encoded(self.model, params, ids)

    def _decode(self, params: Any, latents: Any) -> Any:
        config, decode = self.model.vae.config, module(self.model.vae, params).decode
        scaled = latents / config.scaling_factor
        image = decode_in_tiles(decode, scaled, self.tile // config.scale, config.scale)
        axes = (1, 2, 3)
        finite = jnp.isfinite(latents).all(axes) & jnp.isfinite(image).all(axes)
        return to_uint8(jnp.nan_to_num(image)), finite

    def _looked_at(self, params: Any, given: Any) -> Any:
        return edits.looked_at(module(self.model.vae, params), given, self.made_for)

    def _build_noise(self, shape: tuple[int, ...]) -> Callable:
        return self.devices.map(lambda shared, keys: noise.initial_noise(keys, shape))

    def _denoise(self, sampler: str, guided: bool, shared: Any, batched: Any) -> Denoise:
        """The model as the samplers see it: D(x, sigma)."""
        config = for_sampler(self.model.scheduler, sampler)
        words, w = (batched["cond"], batched["uncond"]), batched["guidance_scale"]
        unet = self._bound(shared["unet"], w - 1 if self.distilled else None)
        if guided and self.made_for == edits.FOLLOWS:
            w_picture = batched["image_guidance_scale"]
            apply = guidance.guided_by_picture(unet, *words, batched["extra"], w, w_picture)
        else:
            apply = guidance.guided(edits.seeing(unet, batched), *words, w, run_uncond=guided)
        denoise = denoiser(apply, config.prediction_type, schedules.schedule_for(config))
        return edits.keeping(denoise, batched)

    def _bound(self, params: Any, guidance: Any) -> guidance.ContextApply:
        """The U-Net, (x, t, told) -> F."""
        unet = module(self.model.unet, params)

        def apply(x, t, told):
            added = None if told.numbers is None else (told.context.pooled, told.numbers)
            return unet(x, t, told.context.words, guidance, added)

        return apply

    def _options(self, sampler: str) -> dict[str, Any]:
        return schedules.sampler_options(for_sampler(self.model.scheduler, sampler))

    def _build_begin(self, sampler: str, guided: bool) -> Callable:
        def begin(shared, batched):
            denoise = self._denoise(sampler, guided, shared, batched)
            scales = shared["initial_scale"], shared["sigmas"][0], shared["anew"]
            x = edits.started(batched["noise"], batched, *scales)
            options = self._options(sampler)
            return samplers.start(sampler, denoise, x, shared["sigmas"], batched["keys"], **options)

        return self.devices.map(begin)

    def _build_segment(self, sampler: str, guided: bool, steps: int, traced: bool) -> Callable:
        def segment(shared, batched):
            carry, trace = samplers.sample_segment(
                sampler,
                self._denoise(sampler, guided, shared, batched),
                batched["carry"],
                shared["sigmas"],
                batched["keys"],
                shared["first"],
                steps,
                **self._options(sampler),
            )
            # the batch comes first in everything that leaves a device
            return carry, jax.tree.map(lambda a: a.swapaxes(0, 1), trace) if traced else None

        return self.devices.map(segment)

    # ---- the way through them

    def _draw(self, requests, contexts, settings, latents=None, frames=0, progress=None):
        """One batch through sampler and decoder: images, which of them are finite, frames."""
        config = for_sampler(self.model.scheduler, settings.sampler)
        whole = schedules.sigmas_for(config, settings.steps)
        sigmas = whole[settings.steps - settings.intervals :]
        guided = settings.guidance_scale != 1.0 and not self.distilled
        small = {
            "sigmas": jnp.asarray(sigmas),
            "initial_scale": jnp.float32(schedules.initial_scale(config, whole)),
            "anew": jnp.float32(settings.strength == 1),
        }
        shared = self.devices.share(small) | {"unet": self.model.unet.params}
        size = settings.batch_size * self.devices.count
        batched = self._batched(requests, contexts, settings, size)
        given = None
        if requests[0].edit is not None:
            given = self.devices.shard_batch(
                {k: pad(a, size) for k, a in edits.pixels([r.edit for r in requests]).items()}
            )
            batched |= self._look(self.model.vae.params, given)
        if latents is None:
            start = self._noise(self._latent_shape(settings))(shared["sigmas"], batched["keys"])
        else:
            start = self.devices.shard_batch(pad(latents, size))
        carry = self._begin(settings.sampler, guided)(shared, batched | {"noise": start})

        total = samplers.find(settings.sampler).steps(settings.intervals)
        length = segment_length(total)
        segment = self._segment(settings.sampler, guided, length, frames > 0)
        traces = []
        for first in range(0, total, length):
            shared["first"] = self.devices.share(jnp.int32(first))
            carry, trace = segment(shared, batched | {"carry": carry})
            traces.append(trace)
            if progress:
                jax.block_until_ready(carry.x)
                progress(length)
        final = carry.x * schedules.final_scale(config, sigmas)
        images, finite = self._decoder(self.model.vae.params, final)
        if given is not None and "mask" in given:
            images = self._paste((), (images, given))
        images, finite = self.devices.gather((images, finite))
        if not frames:
            return images, finite, None
        stages = chosen_stages(traces, start, final, frames)
        return images, finite, Frames(*map(self._decode_stages, stages))

    def _batched(
        self, requests: Sequence[Request], contexts: Mapping[str, Context], settings: Settings, size: int
    ) -> Any:
        """What differs from picture to picture, filled up to `size` and spread over the devices."""
        requests = [*requests, *[requests[-1]] * (size - len(requests))]
        keys = noise.image_keys([r.seed for r in requests], [r.index for r in requests])
        cond, uncond = conditions.told(self.model, requests, contexts, settings)
        arrays = {
            "cond": cond,
            "uncond": uncond,
            "guidance_scale": np.array([r.guidance_scale for r in requests], np.float32),
            "image_guidance_scale": np.array([r.image_guidance_scale for r in requests], np.float32),
        }
        return self.devices.shard_batch(arrays | {"keys": keys})

    def _decode_stages(self, stages: np.ndarray) -> np.ndarray:
        places = [self.devices.shard_batch(x) for x in stages.swapaxes(0, 1)]
        pictures = [self._decoder(self.model.vae.params, x)[0] for x in places]
        return np.stack([np.asarray(p) for p in pictures], axis=1)

    def _latent_shape(self, settings: Settings) -> tuple[int, int, int]:
        config = self.model.vae.config
        return settings.height // config.scale, settings.width // config.scale, config.latent_channels

    def _check_latents(self, latents, count: int, settings: Settings) -> np.ndarray | None:
        if latents is None:
            return None
        latents, wanted = np.asarray(latents, np.float32), (count, *self._latent_shape(settings))
        if latents.shape != wanted:
            raise UserError(f"latents have the shape {latents.shape}; these prompts and sizes need {wanted}")
        return latents
