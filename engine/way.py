"""The part of the way from noise to latents that a model goes, and what of it is compiled in."""

from typing import NamedTuple

import numpy as np

from engine.diffusion import samplers

WATCHED = 8  # noise levels, at most, at which it is seen which word steers what


class Way(NamedTuple):
    """The part of the way from noise to latents that a model goes."""

    sampler: str
    sigmas: np.ndarray  # from where it begins to the end of the grid
    steps: int  # of the sampler, that it takes
    guided: bool
    from_noise: bool = True  # not from where another model stopped
    initial_scale: float = 1.0  # of the noise
    anew: bool = True  # nothing of a given picture is left at its beginning
    within: tuple[float, float] | None = None  # (low, high): noise levels with guidance; None: all
    rescale: float = 0.0  # share of its contrast that guidance gives back
    merge: float = 0.0  # share of the tokens that attend together with others
    fresh: np.ndarray | None = None  # steps that compute the deep part of the U-Net; None: all
    control_within: tuple[float, float] | None = None  # noise levels at which ControlNets act; None: all
    pag: float = 0.0  # scale of the guidance away from perturbed attention
    pag_layers: tuple[str, ...] = ()  # in which that is perturbed, if there is such guidance

    @property
    def kind(self) -> "Kind":
        """What its programs are compiled for."""
        in_part = (self.guided or bool(self.pag_layers)) and self.within is not None
        cached, control_in_part = self.fresh is not None, self.control_within is not None
        rescaled = self.guided and self.rescale != 0
        known = self.sampler, self.guided, in_part, cached, self.merge, control_in_part, rescaled
        return Kind(*known, self.pag_layers)


class Kind(NamedTuple):
    """What a sampler is compiled for, beside sizes; all else is an argument."""

    sampler: str
    guided: bool
    in_part: bool = False  # guided at some noise levels only
    cached: bool = False  # deep features are kept over some steps
    merge: float = 0.0
    control_in_part: bool = False  # ControlNets act at some noise levels only
    rescaled: bool = False  # guidance gives some of its contrast back
    pag_layers: tuple[str, ...] = ()  # in which attention is perturbed, to be led away from that


def watched(way: Way) -> list[int]:
    """The intervals, evenly spread, at whose beginning it is seen which word steers what: not the first."""
    before = samplers.find(way.sampler).steps_before
    reached = [i for i in range(1, len(way.sigmas) - 1) if before(i) <= way.steps]
    places = np.linspace(0, len(reached) - 1, min(WATCHED, len(reached))).round().astype(int)
    return [reached[i] for i in places]
