"""The way from noise to latents: its noise levels, and which model goes which part of it, how."""

import dataclasses
import math
from typing import Any

import numpy as np

from engine import controls, edits
from engine.conditions import steered_away
from engine.config import MAX_UPSCALE, TOLD, check_hires, told_size
from engine.diffusion import samplers, schedules
from engine.diffusion.samplers import Sampler
from engine.diffusion.scheduler_config import SchedulerConfig, for_sampler
from engine.models import merging
from engine.programs import Programs
from engine.requests import PAG_LAYERS, Settings
from engine.types import UserError
from engine.way import Way, watched
from engine.weights.folder import Model
from engine.weights.places import TO_PIXELS, chosen, layers_of

MAX_SIDE = 16384  # of a picture
REFINER_START = 0.8  # of the way; as in its original


def grid_of(settings: Settings, model: Model) -> tuple[SchedulerConfig, np.ndarray]:
    """The scheduler of the sampler, and all sigmas of its grid."""
    config = for_sampler(model.scheduler, settings.sampler)
    if settings.grid in schedules.SPACINGS:
        config = dataclasses.replace(config, timestep_spacing=settings.grid)
    return config, schedules.sigmas_for(
        config, settings.steps, settings.grid, xl=model.text_encoder_2 is not None
    )


def ways_of(settings: Settings, programs: Programs, refiner: Programs | None) -> list[Way]:
    """The way of the model, and behind it that of the refiner where there is one.

    Raises:
      UserError: the settings leave a model without a step, or are not for this one.
    """
    config, whole = grid_of(settings, programs.model)
    sampler = samplers.find(settings.sampler)
    sigmas = whole[settings.steps - settings.intervals :]
    way = Way(
        settings.sampler,
        sigmas,
        sampler.steps(settings.intervals),
        steered_away(programs.model, settings.guidance_scale),
        initial_scale=schedules.initial_scale(config, whole),
        anew=settings.strength == 1,
        within=_within(settings, whole, programs.distilled),
        rescale=_rescale(settings, programs),
        merge=_merge(settings),
        control_within=_control_within(settings, whole, bool(programs.nets)),
        **_perturbed(settings, programs),
    )
    if refiner is None:
        return [way._replace(fresh=_fresh(settings, sampler, way))]
    assert settings.refiner_start is not None
    own = schedules.intervals_above(config, sigmas, settings.refiner_start)
    if not 0 < own < settings.intervals:
        idle = "refiner" if own else "model"
        raise UserError(
            f"refiner_start={settings.refiner_start} leaves none of {settings.intervals} steps to the "
            f"{idle}: write another share, or more steps"
        )
    if programs.nets and settings.controlled_steps.start >= settings.steps - settings.intervals + own:
        raise UserError(
            f"control_start={settings.control_start} lies behind refiner_start={settings.refiner_start}, "
            "where ControlNets add nothing: write a smaller share"
        )
    rest = Way(
        settings.sampler,
        sigmas[own:],
        sampler.steps(settings.intervals - own),
        steered_away(refiner.model, settings.guidance_scale),
        from_noise=False,
        within=_within(settings, whole, refiner.distilled),
        rescale=_rescale(settings, refiner),
        merge=_merge(settings),
        **_perturbed(settings, refiner),
    )
    ways = [way._replace(steps=sampler.steps_before(own)), rest]
    return [way._replace(fresh=_fresh(settings, sampler, way)) for way in ways]


def check_settings(settings: Settings, programs: Programs, refiner: Programs | None) -> None:
    """UserError for what is wrong in itself, or for these models; one line, before anything compiles."""
    samplers.find(settings.sampler)
    grid_of(settings, programs.model)
    edits.check_strength(settings)
    ways_of(settings, programs, refiner)
    if not np.isfinite(settings.guidance_scale):
        raise UserError(f"guidance_scale={settings.guidance_scale} is no number; 1 is none, 5 to 8 are usual")
    if settings.batch_size < 1:
        raise UserError(f"batch_size={settings.batch_size}: write 1 or more")
    if settings.best_of is not None and settings.best_of < 1:
        raise UserError(f"best_of={settings.best_of}: write how many are drawn of each picture, 1 or more")
    scale, what = _multiple(programs)
    for name, side in (("height", settings.height), ("width", settings.width)):
        if side % scale or not scale <= side <= MAX_SIDE:
            good = min(max(round(side / scale), 1) * scale, MAX_SIDE)
            raise UserError(f"{name}={side}: {what} makes multiples of {scale}; write {good}")
    _check_told(settings, programs.model)
    check_hires(settings)
    if settings.hires is not None:
        _check_hires(settings, programs, refiner)


def _check_told(settings: Settings, model: Model) -> None:
    """UserError where a model that is told nothing of sizes is told something."""
    for name in TOLD:
        if not (value := getattr(settings, name)):
            continue
        told_size(name, value)
        without = f"leave it out, or write --{name} '' where a picture remembers it"
        if model.text_encoder_2 is None:
            raise UserError(f"{name}={value}: this model is told nothing of sizes, as SDXL is; {without}")
        if model.scored and name == "target_size":
            raise UserError(f"{name}={value}: SDXL's refiner is told none; {without}")


def _multiple(programs: Programs) -> tuple[int, str]:
    """Of what the sides of pictures are multiples, and what makes them so."""
    scale = programs.model.vae.config.scale
    of_all = math.lcm(scale, controls.cell(programs.nets))
    return of_all, "this model" if of_all == scale else "this model with its T2I-Adapter"


def _check_hires(settings: Settings, programs: Programs, refiner: Programs | None) -> None:
    """UserError where the pictures cannot be drawn over as it is said."""
    if not 1 <= settings.hires <= MAX_UPSCALE:
        raise UserError(f"hires={settings.hires}: write a factor from 1, which is none, to {MAX_UPSCALE}")
    if (larger := settings.larger) is None:
        return
    scale, what = _multiple(programs)
    if any(side % scale or side > MAX_SIDE for side in settings.size):
        height, width = settings.size
        made = (
            f"hires={settings.hires} makes {width} x {height} pixels of {settings.width} x {settings.height}"
        )
        raise UserError(f"{made}; {what} makes multiples of {scale} up to {MAX_SIDE}: write another factor")
    try:
        grid_of(larger, programs.model)
    except UserError as error:  # the first pass's is fine: it is of the steps
        raise UserError(f"hires_{error}") from None
    edits.check_strength(larger, "hires_strength")
    try:
        ways_of(larger, programs, refiner)
    except UserError as error:
        raise UserError(f"hires={settings.hires}: {error}, or a larger hires_strength") from None


def check_refiner_start(given: float | None, refined: bool) -> float | None:
    """Share of the way before the refiner, if there is one; UserError where it is wrong."""
    if not refined:
        if given is not None:
            raise UserError(f"refiner_start={given} without a refiner: write --refiner FOLDER, too")
        return None
    start = REFINER_START if given is None else given
    if not 0 < start < 1:
        raise UserError(f"refiner_start={start}: write a share of the way, above 0 and below 1")
    return start


def check_frames(frames: int, most: int) -> None:
    """UserError for so many stages from static to picture, where there are `most`."""
    if not 2 <= frames <= most:
        raise UserError(f"frames={frames} is out of range; from static to picture: write 2 to {most}")


def check_heat(settings: Settings, programs: Programs, refiner: Programs | None) -> None:
    """Raises UserError where the model's own part of the way is too short to see what words do on it."""
    way, *_ = ways_of(settings, programs, refiner)
    if not watched(way):
        raise UserError(
            "which word steered what shows behind the first step of a model: write more steps"
            + (", or a larger strength" if settings.strength < 1 else "")
            + (", or a larger refiner_start" if refiner else "")
        )


def _within(settings: Settings, sigmas: np.ndarray, distilled: bool) -> tuple[float, float] | None:
    """The noise levels with guidance; None: all."""
    start, end = settings.guidance_start, settings.guidance_end
    for name, share in (("guidance_start", start), ("guidance_end", end)):
        if share is not None and distilled:
            raise UserError(f"{name}={share}: this model learned guidance, and takes it in all steps")
    return _levels(settings, "guidance", range(settings.steps), sigmas, "guidance_scale=1")


def _control_within(settings: Settings, sigmas: np.ndarray, controlled: bool) -> tuple[float, float] | None:
    """The noise levels at which ControlNets add something; None: all."""
    start, end = settings.control_start, settings.control_end
    if not controlled and (start, end) != (None, None):
        raise UserError("control_start, control_end without a ControlNet: write --controlnet FOLDER, too")
    taken = range(settings.steps - settings.intervals, settings.steps)
    return _levels(settings, "control", taken, sigmas, "no --controlnet")


def _levels(
    settings: Settings, kind: str, among: range, sigmas: np.ndarray, instead: str
) -> tuple[float, float] | None:
    """The noise levels of the steps between the shares kind_start and kind_end of `among`; None: all."""
    start, end = (getattr(settings, f"{kind}_{name}") for name in ("start", "end"))
    for name, share in (("start", start), ("end", end)):
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"{kind}_{name}={share}: write a share of the steps, from 0 to 1")
    steps = settings.guided_steps if kind == "guidance" else settings.controlled_steps
    if not steps:
        raise UserError(
            f"{kind}_start={start or 0.0} and {kind}_end={1.0 if end is None else end} leave none of "
            f"{len(among)} steps between them: write shares further apart, or {instead}"
        )
    return None if steps == among else schedules.levels(sigmas, steps)


def _rescale(settings: Settings, programs: Programs) -> float:
    """Share of the contrast."""
    share = settings.guidance_rescale
    if share is None:
        return 0.0
    if not 0 <= share <= 1:
        raise UserError(f"guidance_rescale={share}: write a share of the contrast, from 0 to 1")
    if share and programs.distilled:
        raise UserError(f"guidance_rescale={share}: this model learned guidance, which adds no contrast")
    return share


def _perturbed(settings: Settings, programs: Programs) -> dict[str, Any]:
    """Guidance away from perturbed attention; nothing of none."""
    scale, named = settings.pag_scale or 0.0, settings.pag_layers or PAG_LAYERS
    if not 0 <= scale < math.inf:
        raise UserError(f"pag_scale={scale}: write 0 or more; 3 is usual")
    if not scale:
        return {}
    if programs.distilled:
        raise UserError(f"pag_scale={scale}: this model learned guidance, and takes no other")
    if programs.made_for == edits.FOLLOWS:
        raise UserError(f"pag_scale={scale}: a model that is told how to change a picture takes none")
    layers = tuple(layer.strip() for layer in named.split(","))
    places = [place for place, _ in layers_of(programs.model.unet.config, TO_PIXELS)]
    chosen("pag_layers", "attends among pixels", places, layers)
    return {"pag": scale, "pag_layers": layers}


def _merge(settings: Settings) -> float:
    """Share of the tokens."""
    share = settings.merge_tokens or 0.0
    if not 0 <= share <= merging.MOST:
        raise UserError(f"merge_tokens={share}: write a share of the tokens, from 0 to {merging.MOST}")
    return share


def _fresh(settings: Settings, sampler: Sampler, way: Way) -> np.ndarray | None:
    """The steps that compute the deep part of the U-Net, (way.steps,) bool; None: all."""
    every = settings.cache_interval
    if every is None or every == 1:
        return None
    if every < 1:
        raise UserError(f"cache_interval={every}: write a number of steps, from 1")
    fresh, count = np.zeros(way.steps, bool), len(way.sigmas) - 1
    for interval in range(0, count, every):  # of which some samplers take two steps
        fresh[sampler.steps_before(interval) : sampler.steps_before(interval + 1)] = True
    # What is kept without guidance is not enough with it. The samplers that take two steps an interval meet
    # the first noise level with guidance in the interval before.
    start = settings.guided_steps.start - (settings.steps - count)
    if way.kind.in_part and start > 0:
        fresh[sampler.steps_before(start - 1) : sampler.steps_before(start + 1)] = True
    return fresh
