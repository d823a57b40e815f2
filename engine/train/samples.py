"""Pictures during the training: the same prompts from the same noise, so that one sees what has changed."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from engine import finish
from engine.config import SamplesConfig, StageConfig
from engine.parallel import SPLIT, Devices
from engine.pipeline import Pipeline
from engine.types import Params
from engine.weights.folder import Model, on_devices


class Drawer:
    """Draws with a model of which nothing is on the devices meanwhile: the training needs their memory.

    In the type that the training computes in, and split over the devices where its state is. What was
    compiled is kept.
    """

    def __init__(self, model: Model, stage: StageConfig, name: str, folder: pathlib.Path):
        devices = Devices("jit", rules=SPLIT) if stage.shard_params else Devices()
        self._model, self._pipe = model, Pipeline(model, devices, name, stage.compute_dtype, folder)

    @contextlib.contextmanager
    def ready(self, params: Mapping[str, Params] = MappingProxyType({})) -> Iterator[Pipeline]:
        """Within, the model is on the devices, with `params` of some parts in place of its own."""
        parts = {
            kind: dataclasses.replace(getattr(self._model, kind), params=own) for kind, own in params.items()
        }
        pipe = self._pipe
        pipe.programs.model = on_devices(dataclasses.replace(self._model, **parts), pipe.devices, pipe.dtype)
        try:
            yield pipe
        finally:  # not when Python comes to collect it: programs and their methods are a cycle
            pipe.programs.model = self._model


class Samples:
    """Draws sheets into a folder: FOLDER/00000500.png is of step 500."""

    def __init__(self, config: SamplesConfig, model: Model, stage: StageConfig, folder: pathlib.Path):
        self.every, self._config, self._folder = config.every, config, folder
        self._drawer = Drawer(model, stage, "in training", folder)

    def draw(self, step: int, params: Mapping[str, Params]) -> pathlib.Path:
        """One sheet, with the params of some parts in place of the model's."""
        config, prompts = self._config, list(self._config.prompts)
        with self._drawer.ready(params) as pipe:
            images = pipe.generate(
                prompts,
                seed=config.seed,
                steps=config.steps,
                guidance_scale=config.guidance_scale,
                batch_size=pipe.batch_size_for(len(prompts), *pipe.default_size),
            )
        path = finish.prepare_folder(self._folder) / f"{step:08d}.png"
        about = {"step": step, "prompts": prompts, "seed": config.seed, "sheet": []}
        finish.write_png(path, finish.contact_sheet(images, labels=prompts), about)
        return path
