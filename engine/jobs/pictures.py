"""Pictures into a folder: numbered, named after their prompts, each with the settings that make it again."""

import dataclasses
import itertools
import os
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import engine
from engine import edits, finish
from engine.config import OF_THE_WAY, GenerateConfig, from_json
from engine.diffusion.noise import fresh_seed
from engine.jobs import digests, given
from engine.pipeline import Pipeline
from engine.requests import Frames, Given, Settings
from engine.text.prompts import check_prompt, check_prompts
from engine.types import UserError
from engine.ways import check_frames, check_heat

ANIMATED_FRAMES = 24

# What a picture remembers beside prompt, index and version, all under the names of GenerateConfig.
REMEMBERED = (
    *("negative_prompt", "seed", "sampler", "steps", "guidance_scale", "height", "width"),
    *("model", "dtype", "parallel", "batch_size", "upscale"),
)
# Remembered where there are any.
ADDED = (
    *("lora", "embedding", "decoder", "refiner", "upscaler", "controlnet", "safety_checker"),
    *("ip_adapter", "image_encoder", "image_prompt", "ip_adapter_layers"),
    *(name for name in OF_THE_WAY if name != "best_of"),  # what was chosen is drawn again without the others
    *("prompt_weights", "long_prompts", "clip_skip", "tile", "quantize"),
    *("image", "mask", "control_image", "control_kind", "control_mode"),
)
CHANGING = ("strength", "image_guidance_scale")  # remembered of a picture that was made of another


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, checked against its model and complete."""

    config: GenerateConfig  # seed and all that depends on the model filled in
    prompts: tuple[str, ...]  # one for each picture
    settings: Settings
    stages: int  # of each picture, for strip and animation; 0: none
    folder: pathlib.Path
    contents: Mapping[str, str]  # tells all files that are drawn with from others of their names
    given: Given  # beside the words


class Drawn(NamedTuple):
    """A picture of the run."""

    index: int
    prompt: str
    image: finish.Picture | None  # of the size in which it was drawn
    files: tuple[pathlib.Path, ...]  # the picture, its strip, ... and words; none where a NaN struck it,
    held_back: bool = False  # or where the safety checker found something
    score: float | None = None  # what the judge says, where there is one


def plan(config: GenerateConfig, pipe: Pipeline) -> Plan:
    """Checks everything before anything is compiled, and makes the folder.

    Without a batch size the pictures are spread over the devices, as many at once as seems wise.

    Raises:
      UserError: a setting is wrong for this model, or the folder cannot be written.
    """
    config.validate()
    prompts = tuple(p for p in check_prompts(config.prompts) for _ in range(config.num_images))
    check_prompt(config.negative_prompt)
    paths, height, width = given.of_flags(config), config.height, config.width
    if (first := given.looked(paths)) is not None:
        height, width = given.size(first, pipe, height, width)
    options = (config.steps, config.sampler, config.guidance_scale, height, width)
    settings = pipe.settings(*options, **config.of_the_way())
    beside = given.read(paths, *settings.size, given.shown_by(config, pipe))
    strength = edits.default_strength(beside, pipe.made_for) if config.strength is None else config.strength
    runs = pipe.runs(prompts, [config.negative_prompt] * len(prompts), settings.guidance_scale)
    longest = max(map(len, runs))
    batch_size = config.batch_size or pipe.batch_size_for(longest * config.candidates, *settings.size)
    settings = dataclasses.replace(settings, batch_size=batch_size, strength=strength)
    edits.check_strength(settings)
    pipe.check_given([beside], settings)
    if config.words:
        check_heat(settings, pipe.programs, pipe.refiner)
    known = dataclasses.asdict(settings) | {"dtype": pipe.dtype, "parallel": pipe.devices.mode}
    if beside.image is None:
        del known["strength"]
    seed = fresh_seed() if config.seed is None else config.seed
    stages = _stages(config, pipe.steps_of(settings) + 1)
    folder = finish.prepare_folder(os.path.expanduser(config.out))
    contents = digests.of_files(config, pipe.folder) | digests.of_given(beside)
    config = dataclasses.replace(config, seed=seed, **known)
    return Plan(config, prompts, settings, stages, folder, contents, beside)


def _stages(config: GenerateConfig, most: int) -> int:
    if config.frames is None:
        return min(ANIMATED_FRAMES, most) if config.animate else 0
    check_frames(config.frames, most)
    return config.frames


def draw(plan: Plan, pipe: Pipeline, progress: Callable[[int], None] | None = None) -> Iterator[Drawn]:
    """Draws and writes the pictures, one after another in the order of their index.

    Args:
      progress: called with the number of sampling steps that a batch has gone on.

    Raises:
      UserError: a file cannot be written. Those before it stay.
    """
    config = plan.config
    batches = pipe.stream(
        plan.prompts,
        config.negative_prompt,
        plan.settings,
        seed=config.seed,
        first_index=config.first_index,
        frames=plan.stages,
        heat=config.words,
        progress=progress,
        given=[plan.given] * len(plan.prompts),
        image_guidance_scale=config.image_guidance_scale,
    )
    for batch in batches:
        for i, image in enumerate(batch.images):
            prompt, index = plan.prompts[batch.first + i], batch.index[i]
            if i in batch.spoilt or i in batch.unsafe:
                yield Drawn(index, prompt, None, (), i in batch.unsafe)
                continue
            small = finish.resized(image, *plan.settings.size)
            settings = remember(config, prompt, index, plan.contents)
            name = finish.picture_name(index, prompt)
            path = free_path(plan.folder / name, settings, _beside(settings, config))
            finish.write_png(path, enlarged(image, plan.settings.size, config), settings)
            files = [path]
            if batch.frames is not None:
                files += _write_stages(path, Frames(*(part[i] for part in batch.frames)), settings, config)
            if batch.heat is not None:
                files += _write_words(path, small, batch.heat[i], pipe.words(prompt), settings)
            score = None if batch.scores is None else float(batch.scores[i])
            yield Drawn(index, prompt, small, tuple(files), score=score)


def enlarged(image: finish.Picture, size: tuple[int, int], config: GenerateConfig) -> finish.Larger:
    """A picture as large as it is to be written: `upscale` times as it was drawn, by Lanczos's filter where
    it is not; where an upscaler was at work and no factor is given, as that made it.

    Args:
      size: `Settings.size`.
    """
    if config.upscaler and config.upscale == 1:
        return image
    height, width = size
    return finish.resized(image, height * config.upscale, width * config.upscale)


def batches(plan: Plan, pipe: Pipeline) -> list[range]:
    """Which of the pictures are drawn together, one after another."""
    negatives = [plan.config.negative_prompt] * len(plan.prompts)
    return pipe.batches(plan.prompts, negatives, plan.settings)


def _beside(settings: dict[str, Any], config: GenerateConfig) -> dict[str, dict[str, Any] | None]:
    """What else is written under a picture's name: suffix -> its settings; None where it remembers none."""
    files = {".strip.png": settings | {"frames": config.frames}} if config.frames is not None else {}
    files |= {".words.png": settings | {"words": True}} if config.words else {}
    return files | ({".webp": None} if config.animate else {})


def _write_stages(
    path: pathlib.Path, stages: Frames, settings: dict[str, Any], config: GenerateConfig
) -> list[pathlib.Path]:
    """A strip, the denoised prediction under the noisy latent; an animation of the noisy ones."""
    noisy, denoised = (np.stack([finish.upscale(x, config.upscale) for x in part]) for part in stages)
    files = []
    if config.frames is not None:
        files.append(path.with_suffix(".strip.png"))
        finish.write_png(files[-1], finish.strip(noisy, denoised), settings | {"frames": config.frames})
    if config.animate:
        files.append(path.with_suffix(".webp"))
        finish.write_animation(files[-1], noisy)
    return files


def _write_words(
    path: pathlib.Path,
    image: finish.Picture,
    heat: np.ndarray,
    words: Sequence[tuple[str, list[int]]],
    settings: dict[str, Any],
) -> list[pathlib.Path]:
    """A sheet of which word steered what. A prompt of no words has none."""
    if not words:
        return []
    file = path.with_suffix(".words.png")
    heats = [(word, heat[..., places].mean(-1)) for word, places in words]
    finish.write_png(file, finish.words_sheet(image, heats), settings | {"words": True})
    return [file]


def write_sheet(plan: Plan, drawn: Sequence[Drawn]) -> pathlib.Path:
    """Pictures that have an image, on one sheet: sheet-SEED.png."""
    images = np.stack([picture.image for picture in drawn])
    sheet = finish.contact_sheet(images, labels=[f"{picture.index} {picture.prompt}" for picture in drawn])
    settings = {
        "sheet": [picture.files[0].name for picture in drawn],
        "seed": plan.config.seed,
        "version": engine.__version__,
    }
    path = free_path(plan.folder / f"sheet-{plan.config.seed}.png", settings)
    finish.write_png(path, sheet, settings)
    return path


# ---- what pictures remember


def remember(config: GenerateConfig, prompt: str, index: int, contents: Mapping[str, str]) -> dict[str, Any]:
    """What a picture says of itself: enough to make it again, and to see whether the files are still those.

    Args:
      contents: see `engine.jobs.digests`.
    """
    settings = {name: getattr(config, name) for name in REMEMBERED}
    settings |= {name: value for name in ADDED if (value := getattr(config, name))}
    settings |= {name: getattr(config, name) for name in CHANGING if config.image}
    # Who chose it is no part of how it was drawn.
    drawn_with = {name: mark for name, mark in contents.items() if name != "judge"}
    settings |= {"contents": drawn_with, "version": engine.__version__}
    return {"prompt": prompt, "index": index, **settings}


def remembered(path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """The options of GenerateConfig that draw this picture again, and the version that drew it.

    Among them are a strip's number of frames, that a sheet shows words, and those of ADDED that there were.

    Raises:
      UserError: no picture with settings, or settings that this version cannot follow.
    """
    settings = finish.read_settings(path)
    if "sheet" in settings:
        raise UserError(f"{path} is a contact sheet; write the path of one of its pictures")
    version, _ = settings.pop("version", None), settings.pop("contents", None)
    names = {name: name for name in REMEMBERED} | {"prompt": "prompts", "index": "first_index"}
    if missing := names.keys() - settings.keys():
        raise UserError(f"{path} does not say its {', '.join(sorted(missing))}; write the settings as flags")
    if unknown := settings.keys() - names.keys() - {"frames", "words", *ADDED, *CHANGING}:
        raise UserError(
            f"{path}, drawn by fogsculpt {version}, has settings unknown to this version: "
            f"{', '.join(sorted(unknown))}; install fogsculpt {version}"
        )
    settings["prompt"] = [settings["prompt"]]
    options = {names.get(name, name): value for name, value in settings.items()}
    config = from_json(GenerateConfig, options, str(path))
    return {name: getattr(config, name) for name in options}, str(version)


def remembered_contents(path: str | os.PathLike) -> dict[str, str]:
    """What told the files that a picture was drawn with from others; nothing where it does not say so."""
    contents = finish.read_settings(path).get("contents")
    return contents if isinstance(contents, dict) else {}


def free_path(
    path: pathlib.Path,
    settings: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Any] | None] = types.MappingProxyType({}),
) -> pathlib.Path:
    """The path, or its name with -2, -3, ...: the first that no picture of other settings or files has.

    So nothing is lost when runs share a folder, and the same run twice leaves one set of pictures.

    Args:
      beside: suffixes of the files that come with it, each with its settings. What remembers none belongs to
        the picture of its name.
    """

    def own(file: pathlib.Path, known: Mapping[str, Any] | None) -> bool:
        return not os.path.lexists(file) or (known is not None and _settings_of(file) == known)

    def free(name: pathlib.Path) -> bool:
        known = {suffix: of for suffix, of in beside.items() if of is not None or not os.path.lexists(name)}
        return own(name, settings) and all(own(name.with_suffix(suffix), of) for suffix, of in known.items())

    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if free(name))


def _settings_of(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return finish.read_settings(path)
    except UserError:
        return None
