"""The compiled programs of a model, each mapped over all devices.

  text     ids -> what the text encoders say, once for each distinct prompt
  sampler  noise -> latents, a scan over the steps, run in segments so that one can see how far it is
  decoder  latents -> uint8 pictures

and, where there are pictures to change, one that makes latents of them and one that pastes (`engine.edits`).
Params, contexts, keys, guidance scale and sigmas are arguments: another prompt, seed or scale compiles
nothing. Sizes, the number of steps, the sampler and whether there is guidance at all are static.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine import conditions, edits
from engine.diffusion import guidance, noise, samplers, schedules
from engine.diffusion.parameterization import denoiser
from engine.diffusion.scheduler_config import for_sampler
from engine.diffusion.segments import segment_length
from engine.finish import to_uint8
from engine.models.kernels import kernels
from engine.models.tiles import decode_in_tiles
from engine.parallel import Devices, pad
from engine.requests import Context, Request, Settings
from engine.types import Denoise
from engine.weights.component import Component
from engine.weights.folder import Model


class Way(NamedTuple):
    """The part of the way from noise to latents that a model goes."""

    sampler: str
    sigmas: np.ndarray  # from where it begins to the end of the grid
    steps: int  # of the sampler, that it takes
    guided: bool
    fresh: bool = True  # it begins with noise, not where another model stopped
    initial_scale: float = 1.0  # of the noise
    anew: bool = True  # nothing of a given picture is left at its beginning
    within: tuple[float, float] | None = None  # (low, high): noise levels with guidance; None: all


class Guided(NamedTuple):
    """Whether there is guidance; what is compiled depends on it."""

    anywhere: bool
    in_part: bool  # at some noise levels only, which are arguments


def module(part: Component, params: Any) -> nnx.Module:
    """The module of a part of the model around (traced) params."""
    return nnx.merge(part.graphdef, nnx.State(params))


class Programs:
    """Those of one model. They are compiled when they are first needed, and kept."""

    def __init__(self, model: Model, devices: Devices, name: str, tile: int = 0):
        """tile: side in pixels, of the parts in which the decoder makes larger pictures; 0: none."""
        self.model, self.devices, self.tile = model, devices, tile
        self.distilled = model.unet.config.time_cond_proj_dim is not None  # it knows what guidance does
        self.made_for = edits.made_for(model, name)
        self.text_program = devices.map(self._encode)
        self.decoder_program = devices.map(self._decode)
        self.look_program = devices.map(self._looked_at)
        self.paste_program = devices.map(lambda _, batched: edits.pasted(*batched))
        self.begin_program = functools.cache(self._build_begin)
        self.segment_program = functools.cache(self._build_segment)
        self._noise = functools.cache(self._build_noise)

    # ---- run

    def encode(self, prompts: Sequence[str], size: int) -> dict[str, Context]:
        """What the text encoders say of each of some different prompts, in batches of `size`."""
        ids, params = conditions.ids_of(self.model, prompts), conditions.params_of(self.model)
        found = {}
        for first in range(0, len(prompts), size):
            rows = {kind: pad(each[first : first + size], size) for kind, each in ids.items()}
            batch = self.devices.fetch(self.text_program(params, self.devices.shard_batch(rows)))
            for i, prompt in enumerate(prompts[first : first + size]):
                found[prompt] = jax.tree.map(lambda array, i=i: array[i], batch)
        return found

    def batched(
        self,
        requests: Sequence[Request],
        contexts: Mapping[str, Context],
        settings: Settings,
        keys: noise.Keys,
        given: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """What differs from picture to picture, spread over the devices."""
        cond, uncond = conditions.told(self.model, requests, contexts, settings)
        arrays = {
            "cond": cond,
            "uncond": uncond,
            "guidance_scale": np.array([r.guidance_scale for r in requests], np.float32),
            "image_guidance_scale": np.array([r.image_guidance_scale for r in requests], np.float32),
            "keys": keys,
        }
        found = self.devices.shard_batch(arrays)
        return found if given is None else found | self.look_program(self.model.vae.params, given)

    def noise(self, batched: Mapping[str, Any], shape: tuple[int, ...]) -> jax.Array:
        """Unit noise (B, *shape) that the keys stand for."""
        return self._noise(shape)((), batched["keys"])

    def sample(
        self,
        way: Way,
        x: jax.Array,
        batched: Mapping[str, Any],
        traced: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[jax.Array, list[samplers.Trace | None]]:
        """x at the end of the way, and the traces of its segments if it is traced.

        Args:
          x: unit noise, or if the way is not fresh the latents where another model stopped.
        """
        small = {
            "sigmas": jnp.asarray(way.sigmas),
            "initial_scale": jnp.float32(way.initial_scale),
            "anew": jnp.float32(way.anew),
        }
        if way.within is not None:
            small["within"] = jnp.float32(way.within)
        shared = self.devices.share(small) | {"unet": self.model.unet.params}
        guided = Guided(way.guided, way.within is not None)
        carry = self.begin_program(way.sampler, guided, way.fresh)(shared, {**batched, "x": x})
        length = segment_length(way.steps)
        segment = self.segment_program(way.sampler, guided, length, traced)
        traces = []
        for first in range(0, way.steps, length):
            shared["first"] = self.devices.share(jnp.int32(first))
            carry, trace = segment(shared, {**batched, "carry": carry})
            traces.append(trace)
            if progress:
                jax.block_until_ready(carry.x)
                progress(length)
        return carry.x, traces

    def decode(self, latents: jax.Array, given: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
        """Pictures (uint8), pasted into the given ones where a mask says so, and which of them are finite."""
        images, finite = self.decoder_program(self.model.vae.params, latents)
        if given is not None and "mask" in given:
            images = self.paste_program((), (images, given))
        return images, finite

    # ---- the programs; (shared, batched) -> batched

    def _encode(self, params: Any, ids: Any) -> Context:
        return conditions.encoded(self.model, params, ids)

    def _decode(self, params: Any, latents: Any) -> Any:
        config, decode = self.model.vae.config, module(self.model.vae, params).decode
        scaled = latents / config.scaling_factor
        with self._kernels():
            image = decode_in_tiles(decode, scaled, self.tile // config.scale, config.scale)
        axes = (1, 2, 3)
        finite = jnp.isfinite(latents).all(axes) & jnp.isfinite(image).all(axes)
        return to_uint8(jnp.nan_to_num(image)), finite

    def _looked_at(self, params: Any, given: Any) -> Any:
        with self._kernels():
            return edits.looked_at(module(self.model.vae, params), given, self.made_for)

    def _kernels(self) -> contextlib.AbstractContextManager:
        return kernels(self.devices.platform, self.devices.over_batch)

    def _build_noise(self, shape: tuple[int, ...]) -> Callable:
        return self.devices.map(lambda _, keys: noise.initial_noise(keys, shape))

    def _denoise(self, sampler: str, guided: Guided, shared: Any, batched: Any) -> Denoise:
        """The model as the samplers see it: D(x, sigma)."""
        denoise = self._steered(sampler, guided.anywhere, shared, batched)
        if guided.anywhere and guided.in_part:
            plain = self._steered(sampler, False, shared, batched)
            denoise = guidance.within(denoise, plain, *shared["within"])
        return edits.keeping(denoise, batched)

    def _steered(self, sampler: str, guided: bool, shared: Any, batched: Any) -> Denoise:
        """D(x, sigma), with guidance or without."""
        config = for_sampler(self.model.scheduler, sampler)
        words, w = (batched["cond"], batched["uncond"]), batched["guidance_scale"]
        unet = self.bound(shared["unet"], w - 1 if self.distilled else None)
        if guided and self.made_for == edits.FOLLOWS:
            w_picture = batched["image_guidance_scale"]
            apply = guidance.guided_by_picture(unet, *words, batched["extra"], w, w_picture)
        else:
            apply = guidance.guided(edits.seeing(unet, batched), *words, w, run_uncond=guided)
        return denoiser(apply, config.prediction_type, schedules.schedule_for(config))

    def bound(self, params: Any, guidance_scale: Any = None) -> guidance.ContextApply:
        """The U-Net with (traced) params: (x, t, told) -> F. To be called inside of a program."""
        unet = module(self.model.unet, params)

        def apply(x, t, told):
            added = None if told.numbers is None else (told.context.pooled, told.numbers)
            with self._kernels():
                return unet(x, t, told.context.words, guidance_scale, added)

        return apply

    def _options(self, sampler: str) -> dict[str, Any]:
        return schedules.sampler_options(for_sampler(self.model.scheduler, sampler))

    def _build_begin(self, sampler: str, guided: Guided, fresh: bool) -> Callable:
        def begin(shared, batched):
            x = batched["x"]
            if fresh:
                scales = shared["initial_scale"], shared["sigmas"][0], shared["anew"]
                x = edits.started(x, batched, *scales)
            denoise = self._denoise(sampler, guided, shared, batched)
            options = self._options(sampler)
            return samplers.start(sampler, denoise, x, shared["sigmas"], batched["keys"], **options)

        return self.devices.map(begin)

    def _build_segment(self, sampler: str, guided: Guided, steps: int, traced: bool) -> Callable:
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
