"""A U-Net and all that steers it, as a sampler sees it: words, guidance, ControlNets, what steps keep.

For inside of compiled programs (engine.programs), which hand over params and all that differs from picture to
picture: `shared` and `batched`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from engine import conditions, controls, edits
from engine.diffusion import caching, guidance, samplers, schedules
from engine.diffusion.parameterization import denoiser
from engine.diffusion.scheduler_config import for_sampler
from engine.diffusion.steps import InitStep
from engine.models.controlnet import Control
from engine.models.merging import merging
from engine.models.perturbing import perturbing
from engine.parallel import Devices
from engine.parts import computed, kernels_on, module
from engine.types import Latents, Sigma
from engine.way import Kind
from engine.weights.folder import Model


class Denoising:
    """That of one model."""

    def __init__(self, model: Model, devices: Devices, nets: Sequence[controls.ControlNet], made_for: str):
        """made_for: by `edits.made_for`."""
        self.model, self.devices, self.nets, self.made_for = model, devices, nets, made_for
        self.distilled = model.unet.config.time_cond_proj_dim is not None  # it knows what guidance does

    def controlnets(self, params: Sequence[Any], after: Any = None) -> list[Any]:
        """Those that are called at each step, around their (traced) params."""
        return [
            module(self.nets[i].part, self.devices.whole(params[i], after=after))
            for i in controls.at_each_step(self.nets)
        ]

    def computed(self, shared: Any) -> Any:
        """The networks' params as the arithmetic takes them."""
        in_type = functools.partial(computed, devices=self.devices)
        beside = {name: tuple(map(in_type, shared.get(name, ()))) for name in ("nets", "adapters")}
        return shared | {"unet": in_type(shared["unet"])} | beside

    def sampler(self, kind: Kind, shared: Any, batched: Any) -> InitStep:
        """The sampler with the model bound to it; its state is a `caching.State`."""
        shared = self.computed(shared)  # once, not at every step
        denoise = self._denoise(kind, True, shared, batched)
        if kind.in_part:
            plain = self._denoise(kind, False, shared, batched)
            denoise = guidance.within(denoise, plain, *shared["within"])
        options = schedules.sampler_options(for_sampler(self.model.scheduler, kind.sampler))
        keep = functools.partial(self._kept, kind, shared["unet"]["conv_in"]["kernel"].dtype)
        sampler, grid = samplers.find(kind.sampler), (shared["sigmas"], batched["keys"])
        return caching.keeping(sampler, denoise, keep, *grid, **options)

    def _kept(self, kind: Kind, dtype: np.dtype, x: Latents) -> caching.Kept | tuple[()]:
        """What is kept before there is anything."""
        if not kind.cached:
            return ()
        guided = (2 if self.made_for == edits.FOLLOWS else 1) * kind.guided
        (b, height, width, _), channels = x.shape, self.model.unet.config.deep_channels
        return jnp.zeros((b, 1 + guided + bool(kind.pag_layers), height, width, channels), dtype)

    def _denoise(self, kind: Kind, steered: bool, shared: Any, batched: Any) -> caching.KeepingDenoise:
        """The model as the sampler sees it, with what guidance there is, or without."""
        rows = slice(None) if steered else slice(-1, None)  # of what is kept: the words' own

        def denoise(x, sigma, i, kept):
            recall = caching.Recall(kept[:, rows], shared["fresh"][i]) if kind.cached else None
            D = self.steered(kind, steered, shared, batched, recall, x, sigma)
            return D, kept if recall is None else kept.at[:, rows].set(recall.kept)

        return denoise

    def steered(
        self,
        kind: Kind,
        steered: bool,
        shared: Any,
        batched: Any,
        recall: caching.Recall | None,
        x: Latents,
        sigma: Sigma,
    ) -> Latents:
        """What the model makes of x."""
        config = for_sampler(self.model.scheduler, kind.sampler)
        words, w = (batched["cond"], batched["uncond"]), batched["guidance_scale"]
        control = functools.partial(self._control, shared, batched, sigma) if self.nets else None
        bound = functools.partial(
            *(self.bound, shared["unet"], w - 1 if self.distilled else None, recall, kind.merge, control)
        )
        unet, guided, perturbed = bound(), steered and kind.guided, None
        rescale = shared["rescale"] if kind.rescaled else 0.0
        if steered and kind.pag_layers:
            seeing = lambda rows: edits.seeing(bound(kind.pag_layers, rows), batched)  # noqa: E731
            perturbed = guidance.Perturbed(seeing, shared["pag"])
        if guided and self.made_for == edits.FOLLOWS:
            w_picture = batched["image_guidance_scale"]
            apply = guidance.guided_by_picture(unet, *words, batched["extra"], w, w_picture, rescale)
        else:
            apply = guidance.guided(edits.seeing(unet, batched), *words, w, rescale, guided, perturbed)
        denoise = denoiser(apply, config.prediction_type, schedules.schedule_for(config))
        return edits.keeping(denoise, batched)(x, sigma)

    def _control(
        self, shared: Any, batched: Any, sigma: Sigma, x: Latents, t: Any, told: conditions.Told, added: Any
    ) -> Control:
        """What the ControlNets say; the last arguments as the U-Net takes them."""
        inside = None
        if "nets_within" in shared:
            low, high = shared["nets_within"]
            inside = (low < jnp.max(sigma)) & (jnp.max(sigma) <= high)
        return controls.said(
            functools.partial(self.controlnets, shared["nets"], x),
            x[..., : self.model.vae.config.latent_channels],
            t,
            told.nets or [told.context.words] * len(controls.at_each_step(self.nets)),
            batched["shown"],
            shared["net_scales"],
            added,
            inside,
        )

    def bound(
        self,
        params: Any,
        guidance_scale: Any = None,
        recall: caching.Recall | None = None,
        merge: float = 0.0,
        control: Callable[..., Control] | None = None,
        pag_layers: tuple[str, ...] = (),
        rows: int = 1,
    ) -> guidance.ContextApply:
        """The U-Net with (traced) params: (x, t, told) -> F. To be called inside of a program.

        Args:
          pag_layers, rows: where attention is perturbed, see engine.models.perturbing.
        """

        def apply(x, t, told):
            added = None if told.numbers is None else (told.context.pooled, told.numbers)
            size = self.model.unet.config.finest_attention(*x.shape[1:3])

            def call(recall):
                unet = module(self.model.unet, self.devices.whole(params, after=x))  # at each step anew
                words = told.read or told.context.words
                with kernels_on(self.devices), merging(merge, size):
                    more = control(x, t, told, added) if control else None
                    with perturbing(pag_layers, rows):
                        return unet(x, t, words, guidance_scale, added, recall, more)

            if recall is None or self.devices.rules is None:
                return call(recall)
            return caching.either(call, recall)  # split params of lower levels come where they are used

        return apply
