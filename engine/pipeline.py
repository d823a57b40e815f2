"""The whole way of one picture: words, noise, steps, picture (`engine.programs`: what is compiled of it).

With a refiner, a second model goes the last part of the way from noise to latents (Podell et al. 2023,
section 2.5), with what its own text encoders say of the prompts.
"""

import copy
import dataclasses
import itertools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Unpack

import numpy as np
from jaxtyping import Float, UInt8

from engine import adapters, controls, edits
from engine.checking import Checking
from engine.config import GenerateConfig
from engine.diffusion import noise
from engine.diffusion.scheduler_config import sampler_name
from engine.enlarging import Enlarging
from engine.errors import UserNotice
from engine.judging import Judging, arrived, drawn_at_once
from engine.parallel import Devices
from engine.passes import Passes, latent_shape
from engine.programs import Programs
from engine.prompting import Prompting
from engine.requests import Batch, Context, Finished, Frames, Given, OfTheWay, Request, Settings, check_scaled
from engine.sizing import Sizing
from engine.text.prompts import check_negative_prompts, check_prompts, unread
from engine.text.reading import PLAIN, Reading, said, words
from engine.types import UserError
from engine.ways import check_frames, check_heat, check_refiner_start, check_settings, ways_of
from engine.weights.clip import Clip
from engine.weights.component import Component
from engine.weights.folder import Model
from engine.weights.ip_adapter import Adapter
from engine.weights.network import Network
from engine.weights.source import Loras, Source

BATCH_IMAGES = 16  # pictures a device draws at once, unless told: so that the first are soon there,
BATCH_PIXELS = 8 * 512 * 512  # and all fit into its memory
DEFAULT_STEPS = GenerateConfig.steps
DEFAULT_GUIDANCE = GenerateConfig.guidance_scale


class Pipeline:
    """A loaded model, ready to draw. Stages are compiled when they are first needed, and kept."""

    def __init__(
        self,
        model: Model,
        devices: Devices,
        name: str,
        dtype: str,
        folder: pathlib.Path,
        tile: int = 0,
        refiner: Model | None = None,
        nets: Sequence[controls.ControlNet] = (),
        reading: Reading = PLAIN,
        upscaler: Network | None = None,
        prompted: Sequence[Adapter] = (),
        source: Source | None = None,
        checker: Component | None = None,
        judge: Clip | None = None,
    ):
        self.devices, self.name, self.dtype = devices, name, dtype
        self.folder = folder  # from which the model was loaded
        self.programs = Programs(model, devices, name, tile, nets, reading, prompted)
        self.refiner = Programs(refiner, devices, "the refiner", tile, (), reading) if refiner else None
        self.prompting = Prompting(prompted, devices)
        self.checking = Checking(checker, devices) if checker else None
        self.judging = Judging(judge, devices) if judge else None
        self.enlarging = Enlarging(upscaler, devices, tile) if upscaler else None
        self.sizing = Sizing(devices)
        self.made_for = self.programs.made_for
        self._source = source

    @property
    def model(self) -> Model:
        """What draws; that of `programs`, in which other params may take its place."""
        return self.programs.model

    @property
    def reading(self) -> Reading:
        """How prompts are read."""
        return self.programs.texts.reading

    @property
    def beside(self) -> tuple[str, ...]:
        """Prompts whose contexts are needed whatever is drawn: long ones are filled up with that of none."""
        return ("",) if self.reading.long else ()

    # ---- what people call

    def with_loras(self, loras: Loras) -> "Pipeline":
        """The same with these LoRAs, files and scales, in place of those that it was loaded with.

        Their weights are read again from the model's folder, which must be as it was, and are in memory
        beside those of this one. Nothing is compiled: the two share their programs, and all else.

        Raises:
          UserError: a file is no LoRA of the model, or the model's folder holds another now.
        """
        return self.of(self._source_for(loras).again(loras, self.model))

    def with_model(self, folder: str | os.PathLike, loras: Loras = ()) -> "Pipeline":
        """The same with another model that is built alike, such as a fine-tune, in place of this one's.

        It is read as this one was (dtype, devices, embeddings, clip_skip), and all that is beside this one is
        beside it: refiner, ControlNets, a decoder that was named. Nothing is compiled, unless it predicts
        something else or at other noise levels. Both are in memory until this pipeline is let go.

        Args:
          folder: in the diffusers layout.
          loras: files and scales, in place of those that this one was loaded with.

        Raises:
          UserError: no such folder, a model that is built otherwise, or a file that is no LoRA of it.
        """
        path, source = pathlib.Path(folder).expanduser(), self._source_for(loras)
        other = self.of(source.another(path, loras, self.model))
        other.name, other.folder, other._source = str(folder), path, source._replace(folder=path)
        return other

    def _source_for(self, loras: Loras) -> Source:
        check_scaled("loras", loras)
        if self._source is None:
            raise UserError("this pipeline was not loaded from a folder, and takes no other model or LoRAs")
        return self._source

    def of(self, model: Model) -> "Pipeline":
        """The same with a model that is built alike; see `Programs.of`."""
        other = copy.copy(self)
        other.programs = self.programs.of(model)
        if self.refiner:  # whose latents are the model's
            other.refiner = self.refiner.of(dataclasses.replace(self.refiner.model, vae=model.vae))
        return other

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
        given: Sequence[Given] | None = None,
        strength: float | None = None,
        image_guidance_scale: float = GenerateConfig.image_guidance_scale,
        **special: Unpack[OfTheWay],
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """One picture for each prompt.

        Args:
          negative_prompts: what to steer away from: one for all, or one for each.
          seed: with `first_index` it addresses the noise: picture i has the index first_index + i, and
            looks the same however many are drawn beside it (with best_of=N, the first of its candidates
            has first_index + N i). None draws a fresh seed, which is not told:
            give `engine.fresh_seed()`, and keep it, for pictures that are to be drawn again.
          sampler: a name of engine.diffusion.samplers.SAMPLERS; None: the one that the model's folder names.
          guidance_scale: 1 leaves out the unconditional pass.
          height, width: in pixels; None: the size that the model was trained for.
          latents: start noise of unit variance, in place of the seed's.
          batch_size: pictures a device draws at once; None: all, or as many as are sensible. Each is a
            program, which is compiled: name one where the number of prompts varies.
          given: pictures beside the words, one `engine.requests.Given` for each prompt: to change, all with a
            mask or all without (`engine.edits`); for ControlNets to see (`engine.controls`); as prompts for
            IP-Adapters (`engine.adapters`).
          strength: 0 to 1, how much of a given picture is forgotten; None: 0.8, and 1 with a mask.
          image_guidance_scale: how strictly a model that changes pictures as it is told keeps to the given
            one, where guidance_scale is not 1.
          special: on the way from noise to picture, see `engine.requests.OfTheWay`.

        Raises:
          UserError: an argument is wrong.
          FloatingPointError: a NaN struck a picture; it says which.
        """
        prompts = check_prompts(prompts)
        negatives = check_negative_prompts(negative_prompts, len(prompts))
        if batch_size is None:
            runs = self.runs(prompts, negatives, guidance_scale)
            size = height or self.default_size[0], width or self.default_size[1]
            most = max(map(len, runs)) * (special.get("best_of") or 1)
            batch_size = self.batch_size_for(most, *size)
        if strength is None:
            strength = edits.default_strength(given[0] if given else Given(), self.made_for)
        settings = self.settings(
            steps, sampler, guidance_scale, height, width, batch_size, strength, **special
        )
        seed = noise.fresh_seed() if seed is None else seed
        for warning in unread([*prompts, *negatives], self.model.first_tokenizer, self.reading):
            warnings.warn(warning, UserNotice, 2)
        images = []
        for batch in self.stream(
            prompts,
            negatives,
            settings,
            seed=seed,
            first_index=first_index,
            latents=latents,
            given=given,
            image_guidance_scale=image_guidance_scale,
        ):
            if batch.spoilt:
                struck = [batch.index[i] for i in batch.spoilt]
                raise FloatingPointError(f"NaN or infinity in the latents of index {struck} of seed {seed}")
            if batch.unsafe:
                held = [batch.index[i] for i in batch.unsafe]
                warnings.warn(f"held back by the safety checker, and black: index {held}", UserNotice, 2)
                batch = batch._replace(images=batch.images.copy())
                batch.images[batch.unsafe] = 0
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
        heat: bool = False,
        progress: Callable[[int], None] | None = None,
        given: Sequence[Given] | None = None,
        image_guidance_scale: float = GenerateConfig.image_guidance_scale,
    ) -> Iterator[Batch]:
        """The same, batch by batch as they are done.

        Args:
          frames: how many stages from static to picture to keep of each picture.
          heat: whether to keep how much each place of the latents attends to each token of its prompt, a
            share (engine.models.watching). `words` says which word has which.
          progress: called after each segment with the number of sampling steps it took.
        """
        prompts = check_prompts(prompts)
        negatives = check_negative_prompts(negative_prompts, len(prompts))
        latents = self._check_latents(latents, len(prompts), settings)
        given = [Given()] * len(prompts) if given is None else given
        if len(given) != len(prompts):
            raise UserError(f"{len(given)} pictures for {len(prompts)} prompts: give one for each")
        self.check_given(given, settings)
        if latents is not None and settings.candidates > 1:
            raise UserError(f"best_of={settings.best_of} with latents, which are one start: leave one out")
        if frames > 1:
            check_frames(frames, self.steps_of(settings) + 1)
        if heat:
            check_heat(settings, self.programs, self.refiner)
        batches = self.batches(prompts, negatives, settings)
        indices = range(first_index, first_index + len(prompts) * settings.candidates, settings.candidates)
        requests = [
            Request(prompt, negative, seed, index, settings.guidance_scale, each, image_guidance_scale)
            for prompt, negative, index, each in zip(prompts, negatives, indices, given, strict=True)
        ]
        self._passes.prepare([requests[i] for i in batches[0]], settings, frames > 0 or heat)
        contexts = self.encode([*prompts, *negatives, *self.beside], settings.batch_size)
        for batch in batches:
            first, rows = batch.start, slice(batch.start, batch.stop)
            start = None if latents is None else latents[rows]
            drawn = self._passes(requests[rows], contexts, settings, start, frames, heat, progress)
            finished, kept, steering = drawn
            count = len(requests[rows])
            found = arrived(finished, count)
            spoilt, unsafe = (np.flatnonzero(x).tolist() for x in (~found.finite, found.finite & ~found.safe))
            if kept is not None:
                kept = Frames(kept.noisy[:count], kept.denoised[:count])
            heats = None if steering is None else np.asarray(steering)[:count]
            index = found.index.tolist()
            yield Batch(first, found.images, spoilt, unsafe, index, found.scores, kept, heats)

    def batches(self, prompts: Sequence[str], negatives: Sequence[str], settings: Settings) -> list[range]:
        """Which of the prompts are drawn together: neighbours that are equally long to the model."""
        size = settings.batch_size * self.devices.count
        runs = self.runs(prompts, negatives, settings.guidance_scale)
        return [
            range(start, min(start + size, run.stop))
            for run in runs
            for start in range(run.start, run.stop, size)
        ]

    def runs(self, prompts: Sequence[str], negatives: Sequence[str], guidance_scale: float) -> list[range]:
        """Which of the prompts can be drawn together."""
        pairs = zip(prompts, negatives, strict=True)
        lengths = [self.length(*pair, guidance_scale) for pair in pairs]
        ends = list(itertools.accumulate(len(list(same)) for _, same in itertools.groupby(lengths)))
        return [range(first, end) for first, end in itertools.pairwise([0, *ends])]

    def length(self, prompt: str, negative_prompt: str, guidance_scale: float) -> tuple[int, ...]:
        """In how many parts each model reads them. What is drawn together has one length."""
        if not self.reading.long:
            return ()
        asked = prompt, negative_prompt, guidance_scale
        return tuple(programs.texts.length(*asked) for programs in (self.programs, self.refiner) if programs)

    def encode(self, prompts: Sequence[str], batch_size: int) -> dict[str, Context]:
        """The context of each distinct prompt, computed in batches of one size."""
        distinct = list(dict.fromkeys(prompts))
        found = self.programs.texts.encode(distinct, batch_size * self.devices.count)
        if self.refiner:
            own = self.refiner.texts.encode(distinct, batch_size * self.devices.count)
            found = {prompt: context._replace(refiner=own[prompt]) for prompt, context in found.items()}
        if self.judging:
            texts = [said(prompt, self.reading) for prompt in distinct]
            judged = zip(distinct, self.judging.read(texts, batch_size * self.devices.count), strict=True)
            found |= {prompt: found[prompt]._replace(judged=vector) for prompt, vector in judged}
        return found

    def dispatch(
        self, requests: Sequence[Request], contexts: Mapping[str, Context], settings: Settings
    ) -> Finished:
        """Sets the devices to work on one batch, and returns while they are at it.

        Args:
          requests: at most batch_size x devices; each has its own seed, index and guidance scale.
          contexts: from `encode`, of all prompts and negative prompts, and of those that are `beside`.
          settings: its guidance_scale says by being 1 or not whether there is an unconditional pass.

        Returns:
          Of a whole batch, with what fills it; `engine.judging.arrived` waits for it, and takes that away.
        """
        self.check_given([r.given for r in requests], settings)
        return self._passes(requests, contexts, settings)[0]

    def settings(
        self,
        steps: int = DEFAULT_STEPS,
        sampler: str | None = None,
        guidance_scale: float = DEFAULT_GUIDANCE,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        strength: float = 1.0,
        **special: Unpack[OfTheWay],
    ) -> Settings:
        """Checks settings, and fills in what the model knows; raises UserError before anything compiles."""
        default_height, default_width = self.default_size
        start = check_refiner_start(special.pop("refiner_start", None), self.refiner is not None)
        settings = Settings(
            steps,
            sampler or sampler_name(self.model.scheduler),
            float(guidance_scale),
            default_height if height is None else height,
            default_width if width is None else width,
            batch_size,
            strength,
            refiner_start=start,
            **special,
        )
        check_settings(settings, self.programs, self.refiner)
        if settings.candidates > 1 and self.judging is None:
            why = f"best_of={settings.best_of} without a judge, who says which is the best"
            raise UserError(f"{why}: load the model with judge=FOLDER, a CLIP")
        return settings

    def check_given(self, given: Sequence[Given], settings: Settings) -> None:
        """UserError where pictures beside the words are not what the model and what is beside it need."""
        edits.checked(given, self.made_for, settings)
        controls.checked(given, controls.count(self.programs.nets), settings)
        adapters.checked(given, len(self.programs.adapters))

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt, and which tokens each has; see engine.text.reading."""
        return words(prompt, self.model.first_tokenizer, self.reading)

    def steps_of(self, settings: Settings) -> int:
        """Steps of the sampler that a picture takes, in which the U-Net runs once."""
        here = sum(way.steps for way in ways_of(settings, self.programs, self.refiner))
        return here + (self.steps_of(settings.larger) if settings.larger else 0)

    def passes_of(self, count: int, settings: Settings, shown: bool = False) -> int:
        """How many times a batch takes those steps in which `count` pictures are asked for.

        Args:
          shown: whether frames or heat are, too: of what the judge has chosen they are drawn again.
        """
        at_once = drawn_at_once(count, settings.candidates, settings.batch_size * self.devices.count)
        return -(-settings.candidates // at_once) + (shown and settings.candidates > 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained for."""
        return self.model.default_size

    def share_of(self, count: int) -> int:
        """Pictures a device where `count` are spread over all devices at once."""
        return max(1, -(-count // self.devices.count))

    def batch_size_for(self, count: int, height: int, width: int) -> int:
        """Pictures that a device is to draw at once of `count` of this size, where nobody says."""
        return min(self.share_of(count), max(1, BATCH_PIXELS // (height * width)), BATCH_IMAGES)

    @property
    def _passes(self) -> Passes:
        beside = self.prompting, self.sizing, self.checking, self.enlarging, self.judging
        return Passes(self.programs, self.refiner, *beside)

    def _check_latents(self, latents, count: int, settings: Settings) -> np.ndarray | None:
        if latents is None:
            return None
        latents, wanted = np.asarray(latents, np.float32), (count, *latent_shape(self.programs, settings))
        if latents.shape != wanted:
            raise UserError(f"latents have the shape {latents.shape}; these prompts and sizes need {wanted}")
        return latents
