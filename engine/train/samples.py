"""Pictures during the training: the same prompts from the same noise, so that one sees what has changed."""

import dataclasses
import pathlib
from collections.abc import Mapping

from engine import finish
from engine.config import SamplesConfig
from engine.parallel import Devices
from engine.pipeline import Pipeline
from engine.types import Params
from engine.weights.folder import Model


class Samples:
    """Draws sheets into a folder: FOLDER/00000500.png is of step 500."""

    def __init__(self, config: SamplesConfig, model: Model, folder: pathlib.Path):
        self.every, self._config, self._folder = config.every, config, folder
        self._pipe = Pipeline(model, Devices(), "in training", "float32", folder)

    def draw(self, step: int, params: Mapping[str, Params]) -> pathlib.Path:
        """One sheet, with the params of some parts in place of the model's. What was compiled is kept."""
        model = self._pipe.model
        parts = {
            kind: dataclasses.replace(getattr(model, kind), params=self._pipe.devices.place_tree(own))
            for kind, own in params.items()
        }
        self._pipe.programs.model = dataclasses.replace(model, **parts)
        config, prompts = self._config, list(self._config.prompts)
        images = self._pipe.generate(
            prompts, seed=config.seed, steps=config.steps, guidance_scale=config.guidance_scale
        )
        path = finish.prepare_folder(self._folder) / f"{step:08d}.png"
        about = {"step": step, "prompts": prompts, "seed": config.seed, "sheet": []}
        finish.write_png(path, finish.contact_sheet(images, labels=prompts), about)
        return path
