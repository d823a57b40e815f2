"""The compiled programs of a model, each mapped over all devices.

  text     ids -> what the text encoders say, once for each distinct prompt (`engine.texts`)
  sampler  noise -> latents, a scan over the steps, run in segments so that one can see how far it is
  decoder  latents -> uint8 pictures

and, where there are pictures to change, one that makes latents of them and one that pastes (`engine.edits`);
where there are ControlNets, one that looks at their pictures (`engine.controls`).
Params, contexts, keys, guidance scale and sigmas are arguments: another prompt, seed or scale compiles
nothing. Sizes, the number of steps and what `Kind` says are static.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from engine import adapters, conditions, controls, edits
from engine.compiling import Compiling
from engine.denoising import Denoising
from engine.diffusion import noise, samplers, schedules
from engine.diffusion.segments import segment_length
from engine.finish import to_uint8
from engine.models.tiles import decode_in_tiles
from engine.models.watching import watching
from engine.parallel import Devices
from engine.parts import computed, kernels_on, module
from engine.requests import Context, Request, Settings
from engine.text.reading import PLAIN, Reading
from engine.texts import Texts
from engine.way import Kind, Way, watched
from engine.weights.folder import Model
from engine.weights.ip_adapter import Adapter
from engine.weights.places import layers_of

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Programs:
    """Those of one model. They are compiled when they are first needed, and kept."""

    def __init__(
        self,
        model: Model,
        devices: Devices,
        name: str,
        tile: int = 0,
        nets: Sequence[controls.ControlNet] = (),
        reading: Reading = PLAIN,
        prompted: Sequence[Adapter] = (),
    ):
        """tile: side in pixels, of the parts in which the decoder makes larger pictures; 0: none."""
        self.model, self.devices, self.tile, self.nets = model.bare, devices, tile, tuple(nets)
        self.adapters = tuple(prompted)
        self.made_for = edits.made_for(model, name)
        self.denoising = Denoising(self.model, devices, self.nets, self.made_for)
        inside = copy.copy(self)  # what programs keep: they outlive the params of a model
        self.model, self.texts = model, Texts(model, devices, reading)
        self.decoder_program = devices.map(inside._decode)
        self.look_program = devices.map(inside._looked_at)
        self.show_program = devices.map(inside._shown)
        self.paste_program = devices.map(lambda _, batched: edits.pasted(*batched))
        self.begin_program = functools.cache(inside._build_begin)
        self.segment_program = functools.cache(inside._build_segment)
        self.steering_program = functools.cache(inside._build_steering)
        self._noise = functools.cache(inside._build_noise)
        self.compiling, self._begun = Compiling(devices), set()
        self.prepared: set[Any] = set()  # see engine.passes

    def of(self, model: Model) -> "Programs":
        """The same, compiled as they are, for a model that is built alike.

        One that predicts something else, or at other noise levels, has programs of its own.
        """
        if not schedules.alike(model.scheduler, self.model.scheduler):
            beside = self.tile, self.nets, self.texts.reading, self.adapters
            return Programs(model, self.devices, "the model", *beside)
        other = copy.copy(self)
        other.model, other.texts = model, self.texts.of(model)
        return other

    @property
    def distilled(self) -> bool:
        """Whether the model knows what guidance does."""
        return self.denoising.distilled

    # ---- run

    def batched(
        self,
        requests: Sequence[Request],
        contexts: Mapping[str, Context],
        settings: Settings,
        keys: noise.Keys,
        given: Mapping[str, Any],
        shown: Sequence[Any] = (),
        tokens: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Any]:
        """What differs from picture to picture, spread over the devices.

        Args:
          given: pictures to change, by `edits.pixels`.
          shown: pictures for the ControlNets to see, by `controls.pixels`.
          tokens: what the IP-Adapters make of their pictures, by `engine.prompting`.
        """
        cond, uncond = conditions.told(self.model, requests, contexts, settings, self.texts.reading)
        arrays = {
            "cond": cond,
            "uncond": uncond,
            "guidance_scale": np.array([r.guidance_scale for r in requests], np.float32),
            "image_guidance_scale": np.array([r.image_guidance_scale for r in requests], np.float32),
            "keys": keys,
        }
        found = self.devices.shard_batch(arrays)
        if given:
            found |= self.look_program(self.model.vae.params, given)
        if self.nets:
            found["shown"] = self.show_program(self._net_params, shown)
        for side, each in tokens.items():
            found[side] = found[side]._replace(tokens=each)
        return found

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
          x: unit noise, or if the way is not from noise the latents where another model stopped.
        """
        self.compile_ahead(way, x, batched, traced)
        shared, length = self._shared(way), segment_length(way.steps)
        segment = self.segment_program(way.kind, length, traced)
        state, told = self.begin_program(way.kind, way.from_noise)(shared, {**batched, "x": x})
        batched = {**batched, **told}
        self.compiling.wait(segment)
        traces = []
        for first in range(0, way.steps, length):
            shared["first"] = self.devices.share(jnp.int32(first))
            state, trace = segment(shared, {**batched, "state": state})
            traces.append(trace)
            if progress:
                jax.block_until_ready(state.carry.x)
                progress(length)
        return state.carry.x, traces

    def compile_ahead(self, way: Way, x: Any, batched: Mapping[str, Any], traced: bool = False) -> None:
        """Has the compiler begin with the programs of `sample`, for arguments like these, and of `decode`."""
        length = segment_length(way.steps)
        sizes = x.shape, batched["cond"].context.words.shape, len(way.sigmas), tuple(sorted(batched))
        known = way.kind, way.from_noise, length, traced, sizes
        if not self.compiling.useful or known in self._begun:
            return
        self._begun.add(known)
        shared = self._shared(way)
        state, told = self.begin_program(way.kind, way.from_noise).eval_shape(shared, {**batched, "x": x})
        shared["first"] = jax.ShapeDtypeStruct((), jnp.int32)
        segment = self.segment_program(way.kind, length, traced)
        self.compiling.begin(segment, shared, {**batched, **told, "state": state})
        if way.from_noise:  # what a refiner makes the model before it decodes
            self.compiling.begin(self.decoder_program, self.model.vae.params, x)

    def steering(
        self, way: Way, traces: Sequence[samplers.Trace], batched: Mapping[str, Any]
    ) -> Float[jax.Array, "B h w L"]:
        """How much each place of the latents attends to each token, a share: the mean of some noise levels.

        Args:
          traces: of the way, on which something is `watched`.
        """
        before, chosen = samplers.find(way.sampler).steps_before, watched(way)
        x = np.concatenate(self.devices.fetch([trace.x for trace in traces]), axis=1)
        stages = self.devices.shard_batch(x[:, [before(i) - 1 for i in chosen]])
        shared = self._shared(way, levels=jnp.asarray(way.sigmas[chosen]))
        return self.steering_program(way.kind)(shared, {**batched, "stages": stages})

    def _shared(self, way: Way, **small: jax.Array) -> dict[str, Any]:
        """What all devices have: the networks, and beside them a few numbers."""
        small |= {
            "sigmas": jnp.asarray(way.sigmas),
            "initial_scale": jnp.float32(way.initial_scale),
            "anew": jnp.float32(way.anew),
        }
        if way.kind.in_part:
            small["within"] = jnp.float32(way.within)
        if way.kind.rescaled:
            small["rescale"] = jnp.float32(way.rescale)
        if way.pag_layers:
            small["pag"] = jnp.float32(way.pag)
        if way.fresh is not None:
            small["fresh"] = jnp.asarray(way.fresh)
        found = {"unet": self.model.unet.params}
        if self.nets:
            small = small | {"net_scales": jnp.float32([net.scale for net in self.nets])}
            found["nets"] = self._net_params
        if self.adapters:
            small = small | {"adapter_scales": tuple(jnp.float32(each.scales) for each in self.adapters)}
            found["adapters"] = tuple(each.net.params for each in self.adapters)
        if way.control_within is not None:
            small = small | {"nets_within": jnp.float32(way.control_within)}
        return self.devices.share(small) | found

    @property
    def _net_params(self) -> tuple[Any, ...]:
        return tuple(net.part.params for net in self.nets)

    def decode(self, latents: jax.Array, given: Mapping[str, Any] = NOTHING) -> tuple[Any, Any]:
        """Pictures (uint8), pasted into the given ones where a mask says so, and which of them are finite."""
        self.compiling.wait(self.decoder_program)
        images, finite = self.decoder_program(self.model.vae.params, latents)
        if "mask" in given:
            images = self.paste_program((), (images, given))
        return images, finite

    # ---- the programs; (shared, batched) -> batched

    def _decode(self, params: Any, latents: Any) -> Any:
        params = self.devices.whole(self._in_type(params))
        config, decode = self.model.vae.config, module(self.model.vae, params).decode
        with kernels_on(self.devices):
            image = decode_in_tiles(decode, config.unscaled(latents), self.tile // config.scale, config.scale)
        axes = (1, 2, 3)
        finite = jnp.isfinite(latents).all(axes) & jnp.isfinite(image).all(axes)
        return to_uint8(jnp.nan_to_num(image)), finite

    def _looked_at(self, params: Any, given: Any) -> Any:
        with kernels_on(self.devices):
            vae = module(self.model.vae, self.devices.whole(self._in_type(params)))
            return edits.looked_at(vae, given, self.made_for)

    def _shown(self, params: Any, pictures: Any) -> Any:
        each = zip(self.nets, map(self._in_type, params), controls.places(self.nets), strict=True)
        parts = ((net, module(net.part, self.devices.whole(own)), places) for net, own, places in each)
        return tuple(
            controls.looked(net, network, [pictures[place] / jnp.float32(255) for place in places])
            for net, network, places in parts
        )

    def _in_type(self, params: Any) -> Any:
        return computed(params, self.devices)

    def _build_noise(self, shape: tuple[int, ...]) -> Callable:
        return self.devices.map(lambda _, keys: noise.initial_noise(keys, shape))

    def _build_begin(self, kind: Kind, from_noise: bool) -> Callable:
        def begin(shared, batched):
            x = batched["x"]
            if from_noise:
                scales = shared["initial_scale"], shared["sigmas"][0], shared["anew"]
                x = edits.started(x, batched, *scales)
            init, _ = self.denoising.sampler(kind, shared, batched)
            return init(x), self._read(shared, batched, kind.guided)

        return self.devices.map(begin)

    def _read(self, shared: Any, batched: Any, guided: bool) -> dict[str, conditions.Told]:
        """What the networks make of words and pictures, for all steps."""
        shared = self.denoising.computed(shared)
        unet = module(self.model.unet, self.devices.whole(shared["unet"]))
        nets = self.denoising.controlnets(shared["nets"])
        parts = zip(self.adapters, self.devices.whole(shared["adapters"]), strict=True)
        prompted = [module(each.net, own) for each, own in parts]
        found = {}
        for side in ("cond", "uncond") if guided else ("cond",):
            told = batched[side]
            words, read = told.context.words, unet.read(told.context.words)
            if prompted:
                read = adapters.joined(read, self._places, prompted, told.tokens, shared["adapter_scales"])
            found[side] = told._replace(read=read, nets=tuple(net.read(words) for net in nets), tokens=())
        return found

    @functools.cached_property
    def _places(self) -> list[str]:
        """Of the layers to which IP-Adapters add something."""
        return [place for place, _ in layers_of(self.model.unet.config)]

    def _build_segment(self, kind: Kind, steps: int, traced: bool) -> Callable:
        def segment(shared, batched):
            _, step = self.denoising.sampler(kind, shared, batched)
            state, trace = jax.lax.scan(step, batched["state"], shared["first"] + jnp.arange(steps))
            # the batch comes first in everything that leaves a device
            return state, jax.tree.map(lambda a: a.swapaxes(0, 1), trace) if traced else None

        return self.devices.map(segment)

    def _build_steering(self, kind: Kind) -> Callable:
        def steering(shared, batched):
            shared = self.denoising.computed(shared)
            batched = batched | self._read(shared, batched, False)

            def seen(total, stage):
                x, sigma = stage
                with watching() as watch:
                    self.denoising.steered(kind, False, shared, batched, None, x, sigma)
                return total + watch.mean(*x.shape[1:3]), None

            stages = batched["stages"].swapaxes(0, 1)
            tokens = batched["cond"].context.words.shape[1]
            total = jnp.zeros((*stages.shape[1:4], tokens), jnp.float32)
            return jax.lax.scan(seen, total, (stages, shared["levels"]))[0] / len(stages)

        return self.devices.map(steering)
