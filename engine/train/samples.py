"""Pictures during the training: the same prompts from the same noise, so that one sees what has changed."""

import dataclasses
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np

from engine import finish, sights
from engine.config import SamplesConfig, StageConfig
from engine.controls import ControlNet
from engine.diffusion.schedules import for_sampler, sigmas_for
from engine.parallel import SPLIT, Devices
from engine.pipeline import Pipeline
from engine.pixels import Crop, Unusable, read_pixels
from engine.requests import Given
from engine.types import Params, UserError
from engine.weights.component import Component
from engine.weights.folder import Model, on_devices


class Drawer:
    """Draws with a model of which nothing is on the devices meanwhile: the training needs their memory.

    In the type that the training computes in, and split over the devices where its state is. What was
    compiled is kept.
    """

    def __init__(
        self,
        model: Model,
        stage: StageConfig,
        name: str,
        folder: pathlib.Path,
        net: Component | None = None,
    ):
        """net: a ControlNet that is trained."""
        devices = Devices("jit", rules=SPLIT) if stage.shard_params else Devices()
        self._model, self._nets = model, [ControlNet(net, 1.0)] if net else []
        self._pipe = Pipeline(model, devices, name, stage.compute_dtype, folder, nets=self._nets)

    def ready(self, params: Mapping[str, Params] = MappingProxyType({})) -> Pipeline:
        """The model on the devices, as long as it is held, with `params` of some parts in place of its own.

        Those of "controlnet" are the ControlNet's.
        """
        parts = {
            kind: dataclasses.replace(getattr(self._model, kind), params=own)
            for kind, own in params.items()
            if kind != "controlnet"
        }
        whole = dataclasses.replace(self._model, **parts)
        pipe = self._pipe.of(on_devices(whole, self._pipe.devices, self._pipe.dtype))
        if "controlnet" in params:
            placed = pipe.devices.place_tree(params["controlnet"], jnp.dtype(pipe.dtype))
            own = [net._replace(part=dataclasses.replace(net.part, params=placed)) for net in self._nets]
            pipe.programs.nets = tuple(own)
        return pipe


class Samples:
    """Draws sheets into a folder: FOLDER/00000500.png is of step 500."""

    def __init__(
        self,
        config: SamplesConfig,
        model: Model,
        stage: StageConfig,
        folder: pathlib.Path,
        net: Component | None = None,
        sight: str = "",
    ):
        """Args:
        net: a ControlNet that is trained; what it is shown of config.images is `sight`.

        Raises:
          UserError: one of these files cannot be read, or there are too many steps.
        """
        if config.every:  # a mistake in it is told now, not when the first is drawn
            scheduler = for_sampler(model.scheduler, config.sampler) if config.sampler else model.scheduler
            sigmas_for(scheduler, config.steps)
        self.every, self._config, self._folder = config.every, config, folder
        self._drawer = Drawer(model, stage, "in training", folder, net)
        self._given = None
        if net is not None and config.every:
            size = model.default_size
            shown = [sights.seen(sight, _picture(path, *size, alpha=bool(sight))) for path in config.images]
            self._given = [Given(control=(each,)) for each in shown]

    def draw(self, step: int, params: Mapping[str, Params]) -> pathlib.Path:
        """One sheet, with the params of some parts in place of the model's."""
        config, prompts = self._config, list(self._config.prompts)
        pipe = self._drawer.ready(params)
        images = pipe.generate(
            prompts,
            seed=config.seed,
            steps=config.steps,
            sampler=config.sampler or None,
            guidance_scale=config.guidance_scale,
            batch_size=pipe.batch_size_for(len(prompts), *pipe.default_size),
            given=self._given,
        )
        del pipe  # its params leave the devices
        if self._given:
            shown = np.stack([each.control[0] for each in self._given])
            images = np.concatenate([shown, images], axis=2)  # side by side
        path = finish.prepare_folder(self._folder) / f"{step:08d}.png"
        about = {"step": step, "prompts": prompts, "seed": config.seed, "sheet": []}
        finish.write_png(path, finish.contact_sheet(images, labels=prompts), about)
        return path


def _picture(path: str, height: int, width: int, alpha: bool) -> np.ndarray:
    """The pixels of a file, (height, width, 3); UserError where it cannot be read."""
    try:
        with open(pathlib.Path(path).expanduser(), "rb") as file:
            return read_pixels(file, width, height, Crop(), alpha)
    except OSError as error:
        raise UserError(f"samples.images: {path}: {error.strerror or error}") from None
    except Unusable as problem:
        raise UserError(f"samples.images: {path}: {problem}; write a PNG, JPEG or WebP") from None
