"""Pictures during the training: the same prompts from the same noise, so that one sees what has changed."""

import dataclasses
import pathlib
from collections.abc import Mapping

from engine import finish
from engine.config import SamplesConfig
from engine.parallel import SPLIT, Devices
from engine.pipeline import Pipeline
from engine.types import Params
from engine.weights.folder import Model, on_devices


class Samples:
    """Draws sheets into a folder: FOLDER/00000500.png is of step 500."""

    def __init__(self, config: SamplesConfig, model: Model, folder: pathlib.Path, split: bool = False):
        """split: the model over the devices, where a copy on each is too much."""
        self.every, self._config, self._folder, self._model = config.every, config, folder, model
        devices = Devices("jit", rules=SPLIT) if split else Devices()
        self._pipe = Pipeline(model, devices, "in training", "float32", folder)

    def draw(self, step: int, params: Mapping[str, Params]) -> pathlib.Path:
        """One sheet, with the params of some parts in place of the model's.

        What was compiled is kept; the params are not, as the training needs the memory.
        """
        config, prompts = self._config, list(self._config.prompts)
        parts = {
            kind: dataclasses.replace(getattr(self._model, kind), params=own) for kind, own in params.items()
        }
        self._pipe.programs.model = on_devices(dataclasses.replace(self._model, **parts), self._pipe.devices)
        try:
            images = self._pipe.generate(
                prompts, seed=config.seed, steps=config.steps, guidance_scale=config.guidance_scale
            )
        finally:
            self._pipe.programs.model = self._model
        path = finish.prepare_folder(self._folder) / f"{step:08d}.png"
        about = {"step": step, "prompts": prompts, "seed": config.seed, "sheet": []}
        finish.write_png(path, finish.contact_sheet(images, labels=prompts), about)
        return path
