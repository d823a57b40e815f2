"""What a training from scratch learns from: the drawn world, or pictures with captions of one's own."""

import functools
import pathlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from engine import world
from engine.config import TrainConfig
from engine.text.tokenizer import Tokenizer
from engine.train.data import Batch, BatchAt, captioned_pictures, pictures
from engine.train.sources import PictureBatches, batches_of, open_pictures
from engine.types import UserError
from engine.world.drawing import MULTIPLE

# What is added to a run's seed: each stage draws its own scenes and noise.
SEEDS = {"autoencoder": 0, "diffusion": 1, "decoder": 2, "words": 3}
LATENT_SEED = 2**31  # not the training's seeds: scenes of their own


@runtime_checkable
class StageData(Protocol):
    """Of a host, where there are several: its rows of each batch, see `engine.train.data.own_rows`."""

    def texts(self, count: int) -> tuple[list[str], list[str]]:
        """At most `count` captions for the tokenizer; and the words, or phrases, that the model will know."""
        ...

    def images(self, count: int) -> np.ndarray:
        """At most `count` pictures to measure latents with: uint8 (N, S, S, 3), the same on all hosts."""
        ...

    def pictures(self, name: str) -> BatchAt:
        """For the stage `name`: step -> {"image": uint8 (B / processes, H, W, 3)}"""
        ...

    def captioned(self, tokenizer: Tokenizer) -> BatchAt:
        """For the stage of diffusion: the same beside "ids": int32 (B / processes, L)."""
        ...


def stage_data(config: TrainConfig, workdir: pathlib.Path, process: int, processes: int) -> StageData:
    """What the config names; pictures are not looked at before they are needed. UserError as in `Scenes`."""
    if config.data.paths:
        return OwnPictures(config, workdir, process, processes)
    return Scenes(config, process, processes)


class Scenes:
    """The drawn world, addressed by seed and step.

    Raises:
      UserError: it has no pictures of the config's size.
    """

    def __init__(self, config: TrainConfig, process: int = 0, processes: int = 1):
        if config.image_size % MULTIPLE:
            raise UserError(
                f"image_size={config.image_size}: the world is drawn in multiples of {MULTIPLE} pixels, or "
                "write data.paths to learn from pictures of your own"
            )
        self._config = config
        self._how = {"process": process, "processes": processes, "tellers": config.data.tellers}

    def texts(self, count: int) -> tuple[list[str], list[str]]:
        return world.told(0, 0, count)[0], sorted(world.words())

    def images(self, count: int) -> np.ndarray:
        return np.asarray(pictures(LATENT_SEED, count, self._config.image_size)(0)["image"])

    def pictures(self, name: str) -> BatchAt:
        batch_size = getattr(self._config, name).batch_size
        return pictures(self._config.seed + SEEDS[name], batch_size, self._config.image_size, **self._how)

    def captioned(self, tokenizer: Tokenizer) -> BatchAt:
        stage = self._config.diffusion
        return captioned_pictures(
            self._config.seed + SEEDS["diffusion"],
            stage.batch_size,
            self._config.image_size,
            tokenizer,
            stage.easy,
            stage.easy_steps,
            stage.keep_tags if stage.caption_shuffle else None,
            **self._how,
        )


class OwnPictures:
    """The pictures of config.data, looked at once for all stages; their order is that of data.seed."""

    def __init__(self, config: TrainConfig, workdir: pathlib.Path, process: int = 0, processes: int = 1):
        self._config, self._workdir = config, workdir
        self._process, self._processes = process, processes

    @functools.cached_property
    def _all(self) -> PictureBatches:
        config = self._config
        return open_pictures(config.data, 1, config.image_size, self._workdir, self._process)

    def texts(self, count: int) -> tuple[list[str], list[str]]:
        captions = self._all.sample_captions(count)
        return captions, captions

    def images(self, count: int) -> np.ndarray:
        return self._all.sample_images(count, self._config.image_size)

    def pictures(self, name: str) -> BatchAt:
        return self._batches(getattr(self._config, name).batch_size, None)

    def captioned(self, tokenizer: Tokenizer) -> BatchAt:
        stage = self._config.diffusion
        keep_tags = stage.keep_tags if stage.caption_shuffle else None
        return self._batches(stage.batch_size, tokenizer, keep_tags)

    def _batches(self, size: int, tokenizer: Tokenizer | None, keep_tags: int | None = None) -> BatchAt:
        seed, hosts = self._config.data.seed, (self._process, self._processes)

        def begin() -> BatchAt:
            return batches_of(self._all.cut(size).rows, seed, size, tokenizer, *hosts, keep_tags)

        return _begun_late(begin)


def _begun_late(begin: Callable[[], BatchAt]) -> BatchAt:
    """Batches that are made ready when the first is asked for: an export asks for none."""
    ready = functools.cache(begin)

    def batch_at(step: int) -> Batch:
        return ready()(step)

    return batch_at
