"""How noisy the latents are: a model folder's scheduler config, its noise levels, and the grid to sample on.

Everything here is in the variance-exploding scaling of Karras et al. 2022 (EDM): x = x0 + sigma * eps.
A variance-preserving model sees x / sqrt(1 + sigma^2), with alphas_cumprod = 1 / (1 + sigma^2); a flow
model sees x / (1 + sigma) = (1 - t) x0 + t eps, with sigma = t / (1 - t), t from 0 (clean) to 1 (noise).
That choice of sigma keeps the signal-to-noise ratio 1 / sigma^2 the same in all scalings, so every
sampler serves every model, and Euler steps in sigma *are* the flow's Euler steps in t. An EDM, a model that
learned as Karras et al. say (Playground 2.5, CosXL), has no table of noise levels: any sigma is as good.

Pure noise (t = 1, or zero terminal SNR) has no finite sigma. It is capped at SIGMA_CAP: there the image's
share of x is 1e-6 of the noise's, below what float32 arithmetic and any model can see.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engine.config import nearest
from engine.diffusion.scheduler_config import (
    ALIGNED,
    CLASSES,
    DEIS,
    GRIDS,
    LCM,
    MULTISTEP,
    RULES,
    SHAPED,
    SPACINGS,
    TCD,
    UNIPC,
    SchedulerConfig,
    for_sampler,
    sampler_name,
)
from engine.types import Sigma, UserError

__all__ = [
    "Schedule",
    "SchedulerConfig",
    "alphas_cumprod",
    "betas",
    "final_scale",
    "for_sampler",
    "initial_scale",
    "sampler_name",
    "sampler_options",
    "schedule_for",
    "sigmas_for",
]

SIGMA_CAP = 2.0**20
SMALL_SIGMA_CAP = 2.0**12  # zero terminal SNR where diffusers caps it too, at alphas_cumprod 2^-24
# Sabour et al. 2024 ("Align Your Steps"): the timesteps of ten steps, which they found for Stable Diffusion
# 1.5 and for SDXL by how far a solver strays in them.
ALIGNED_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
ALIGNED_TIMESTEPS_XL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)


def betas(config: SchedulerConfig) -> np.ndarray:
    """Variance that each training timestep adds, (T,) float64, before any rescaling to zero terminal SNR."""
    T = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, T)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(config.beta_start**0.5, config.beta_end**0.5, T) ** 2
    # Nichol & Dhariwal 2021, equation 17
    alpha_bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def alphas_cumprod(config: SchedulerConfig) -> np.ndarray:
    """Share of the image's variance left at each training timestep, (T,) float64, positive.

    With `rescale_betas_zero_snr`, sqrt(alphas_cumprod) is shifted and scaled to end at 0 (Lin et al. 2023,
    algorithm 1) and its last value then replaced by the one of the sigma cap.
    """
    alphas_bar = np.cumprod(1 - betas(config))
    if config.rescale_betas_zero_snr:
        root = np.sqrt(alphas_bar)
        alphas_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        exact = config.class_name in ("DDIMScheduler", "DDPMScheduler", LCM, TCD)
        alphas_bar[-1] = (SIGMA_CAP if exact else SMALL_SIGMA_CAP) ** -2
    return alphas_bar


def _table(config: SchedulerConfig) -> np.ndarray:
    """sigma of every training timestep, (T,) float64, rising. Of an EDM: its grid of as many steps."""
    if config.is_edm:
        return _edm_grid(config, config.num_train_timesteps, None)[::-1]
    if config.is_flow:
        t = np.arange(1, config.num_train_timesteps + 1) / config.num_train_timesteps
        return _flow_sigma(_shifted(t, config.shift))
    alphas_bar = alphas_cumprod(config)
    return np.sqrt((1 - alphas_bar) / alphas_bar)


def _shifted(t: float | np.ndarray, shift: float) -> float | np.ndarray:
    """Esser et al. 2024, equation 23."""
    return shift * t / (1 + (shift - 1) * t)


def _flow_sigma(t: np.ndarray) -> np.ndarray:
    return t / np.maximum(1 - t, t / SIGMA_CAP)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The noise levels that a model was trained on. A pytree of one array.

    Attributes:
      sigmas: (T,) float32, rising: sigma of each training timestep.
      flow: timesteps are T sigma / (1 + sigma), not positions in the table.
      whole: the model is only shown whole timesteps, the nearest ones (as diffusers' DPM-Solver does).
      sigma_data: of an EDM, whose timesteps are log(sigma) / 4, and which sees x and is read in its own way
        (engine.diffusion.parameterization); None: it is none.
    """

    sigmas: Any
    flow: bool = dataclasses.field(default=False, metadata={"static": True})
    whole: bool = dataclasses.field(default=False, metadata={"static": True})
    sigma_data: float | None = dataclasses.field(default=None, metadata={"static": True})

    def sigma_to_t(self, sigma: Sigma) -> Float[Array, "*B"]:
        """Timestep that the model is given for a noise level, 0 to T, by log-linear interpolation.

        Exact at the table's own sigmas; levels beyond its ends get the ends' timesteps.
        """
        sigmas = jnp.asarray(self.sigmas, sigma.dtype)
        T = sigmas.shape[0]
        if self.flow:
            return T * sigma / (1 + sigma)
        if self.sigma_data is not None:
            return jnp.log(sigma) / 4
        low = jnp.clip(jnp.sum(sigma[..., None] >= sigmas, -1) - 1, 0, T - 2)
        sigma = jnp.clip(sigma, sigmas[0], sigmas[-1])
        # log of ratios, not a difference of logs: neighbouring levels differ by less than 1 %
        t = low + jnp.log(sigma / sigmas[low]) / jnp.log(sigmas[low + 1] / sigmas[low])
        return jnp.round(t) if self.whole else t

    def t_to_sigma(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Inverse of `sigma_to_t`, whole or not: noise level of a timestep, which may be fractional."""
        sigmas = jnp.asarray(self.sigmas, t.dtype)
        T = sigmas.shape[0]
        if self.flow:
            return t / jnp.maximum(T - t, t / SIGMA_CAP)
        if self.sigma_data is not None:
            return jnp.exp(4 * t)
        low = jnp.clip(jnp.floor(t).astype(int), 0, T - 2)
        weight = jnp.clip(t - low, 0, 1)
        return sigmas[low] * (sigmas[low + 1] / sigmas[low]) ** weight


def schedule_for(config: SchedulerConfig) -> Schedule:
    """The noise levels of a scheduler config."""
    whole = config.class_name in MULTISTEP
    sigma_data = config.sigma_data if config.is_edm else None
    return Schedule(_table(config).astype(np.float32), config.is_flow, whole, sigma_data)


def sigmas_for(config: SchedulerConfig, steps: int, grid: str | None = None, xl: bool = False) -> np.ndarray:
    """The noise levels to sample on, as diffusers' scheduler of that class and these options sets them.

    Args:
      steps: number of sampling steps, 1 to num_train_timesteps.
      grid: one of GRIDS in place of the config's own. "sgm_uniform" (ComfyUI's name) is close to "trailing",
        within a timestep and a half: T - 1 down to 0 in equal parts, 0 left out, and nothing rounded.
      xl: the model is an SDXL, which "ays" has timesteps of its own for.

    Returns:
      (steps + 1,) float32, falling. The last is 0, or the sigma of timestep 0 where the config says so
      (`set_alpha_to_one` false, `final_sigmas_type` "sigma_min").

    Raises:
      UserError: steps out of range, an unknown grid, or one that the model has not.
    """
    T = config.num_train_timesteps
    if not 1 <= steps <= T:
        raise UserError(f"steps={steps} is out of range; write 1 to {T} (the model's training timesteps)")
    grids = () if config.is_flow else SHAPED if config.is_edm else GRIDS
    if grid is not None and grid not in grids:
        allowed = ", ".join(grids) or "none: a flow model has one grid"
        raise UserError(f"grid={grid!r} is not supported{nearest(grid, grids)}; supported: {allowed}")
    if config.is_edm:
        end = _final_sigma(config, np.array([config.sigma_min]))
        return np.append(_edm_grid(config, steps, grid), end).astype(np.float32)
    if config.is_flow:
        # The original shifts its smallest t twice: once in the table, once with the rest of the grid.
        t = np.linspace(1, _shifted(1 / T, config.shift), steps)
        return np.append(_flow_sigma(_shifted(t, config.shift)), 0.0).astype(np.float32)

    table = _table(config)
    distilled = grid is None and config.class_name in (LCM, TCD)
    spacing = "distilled" if distilled else grid if grid in SPACINGS else config.spacing
    sigmas = np.interp(_timesteps(config, steps, spacing), np.arange(T), table)
    if grid == "sgm_uniform":  # between the table's timesteps, log-linear: unlike diffusers'
        t = np.linspace(T - 1, 0, steps + 1)[:-1]
        sigmas = np.exp(np.interp(t, np.arange(T), np.log(table)))
    if grid == ALIGNED:
        sigmas = _aligned(config, table, steps, xl)
    if shape := _shape(config, grid):
        ends = table[[-1, 0]] if config.class_name in MULTISTEP else sigmas[[0, -1]]
        sigma_max = config.option("sigma_max", None) or ends[0]
        sigma_min = config.option("sigma_min", None) or ends[1]
        sigmas = shape(steps, sigma_min, sigma_max)
        table = sigmas[::-1] if config.class_name == UNIPC else table  # which is where the last step ends
    return np.append(sigmas, _final_sigma(config, table)).astype(np.float32)


def intervals_above(config: SchedulerConfig, sigmas: np.ndarray, share: float) -> int:
    """How many intervals of a grid begin in the first `share` of the training timesteps, noise to picture.

    As the handover from SDXL to its refiner in diffusers (`denoising_end`).

    Raises:
      UserError: of an EDM, which has no timesteps.
    """
    if config.is_edm:
        raise UserError("an EDM (Playground 2.5, CosXL) has no refiner: leave --refiner out")
    T = config.num_train_timesteps
    cut = schedule_for(config).t_to_sigma(jnp.float32(min(round(T - share * T), T - 1)))
    return int(np.sum(sigmas[:-1] >= float(cut) * (1 - 1e-5)))


def levels(sigmas: np.ndarray, steps: range) -> tuple[float, float]:
    """(low, high) such that low < sigma <= high are the noise levels of some steps of a grid.

    A little above each step's sigma, which samplers may know to some bits less.
    """
    high = np.inf if steps.start == 0 else float(sigmas[steps.start]) * (1 + 1e-4)
    low = -1.0 if steps.stop == len(sigmas) - 1 else float(sigmas[steps.stop]) * (1 + 1e-4)
    return low, high


def _edm_grid(config: SchedulerConfig, steps: int, grid: str | None) -> np.ndarray:
    """Of an EDM, falling from sigma_max to sigma_min, (steps,) float64. One step begins at sigma_max."""
    assert config.sigma_min is not None and config.sigma_max is not None
    ends = config.sigma_min, config.sigma_max
    if (grid or config.sigma_schedule) == "karras":
        return karras(steps, *ends, config.rho)
    return exponential(steps, *ends)


def _aligned(config: SchedulerConfig, table: np.ndarray, steps: int, xl: bool) -> np.ndarray:
    """Of "ays", (steps,) float64: with other than ten steps log-linear between those, as its authors do.

    Raises:
      UserError: the model learned with other noise levels than those that it was found for.
    """
    if config.beta_schedule != "scaled_linear" or config.rescale_betas_zero_snr:
        raise UserError(
            f"grid={ALIGNED!r} is for the noise levels of Stable Diffusion 1, 2 and XL, and this model has "
            "others: leave it out"
        )
    ten = table[[*(ALIGNED_TIMESTEPS_XL if xl else ALIGNED_TIMESTEPS), 0]]
    places = np.linspace(0, 1, steps + 1)[:-1]
    return np.exp(np.interp(places, np.linspace(0, 1, len(ten)), np.log(ten)))


def _shape(config: SchedulerConfig, grid: str | None) -> Callable | None:
    """The formula that spreads the sigmas between their ends, where the timesteps do not."""
    if grid == "karras" or (grid is None and config.option("use_karras_sigmas", False)):
        return karras
    if grid == "exponential" or (grid is None and config.option("use_exponential_sigmas", False)):
        return exponential
    return None


def _timesteps(config: SchedulerConfig, steps: int, spacing: str) -> np.ndarray:
    """The training timesteps to sample at, (steps,), falling (Lin et al. 2023, table 2).

    One step starts at the noisiest timestep whatever the rounding, where numpy's linspace would give the
    cleanest. DPM-Solver counts the end of its last step as one more point of linspace and leading.
    """
    if spacing == "distilled":
        return _distilled_timesteps(config, steps)
    T, multistep = config.num_train_timesteps, config.class_name in MULTISTEP
    points = steps + 1 if multistep else steps
    if spacing == "linspace":
        t = np.linspace(0, T - 1, max(points, 2))[::-1][:steps]
        t = t if config.rules.family == "ve" else np.round(t)
    elif spacing == "leading":
        t = np.arange(points)[::-1][:steps] * max(T // points, 1) + config.steps_offset
    else:
        t = np.round(T - np.arange(steps) * (T / steps)) - 1
    return np.clip(t, 0, T - 1)


def _distilled_timesteps(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Of LCM and TCD: `steps` of the timesteps that the model was distilled at, evenly spread.

    Raises:
      UserError: there are not so many.
    """
    originals = config.original_inference_steps
    if steps > originals:
        raise UserError(f"steps={steps} is out of range; write 1 to {originals} (those of the distillation)")
    index = np.floor(np.linspace(0, originals, steps, endpoint=False))
    return (originals - index) * (config.num_train_timesteps // originals) - 1


def _final_sigma(config: SchedulerConfig, table: np.ndarray) -> float:
    """Where the last step ends: 0, or the smallest sigma of training."""
    if config.class_name in (DEIS, TCD):
        return table[0]
    alpha_to_one = config.option("set_alpha_to_one", True)
    if alpha_to_one is None:  # the originals' own defaults
        alpha_to_one = config.class_name == "DDIMScheduler"
    return 0.0 if alpha_to_one and config.option("final_sigmas_type", "zero") == "zero" else table[0]


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Karras et al. 2022, equation 5, (steps,) float64."""
    ramp = np.linspace(0, 1, steps)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def exponential(steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Evenly spaced in log sigma, (steps,) float64."""
    return np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), steps))


def sampler_options(config: SchedulerConfig) -> dict[str, Any]:
    """What the config says of its sampler beyond the grid: keyword arguments for `samplers.sample`."""
    options: dict[str, Any] = {}
    if config.class_name in (DEIS, UNIPC):
        options["solver_order"] = config.solver_order
    if config.class_name in (LCM, TCD):
        options["schedule"] = schedule_for(config)
    if config.class_name == LCM:
        options["timestep_scaling"] = config.timestep_scaling
    if config.class_name == UNIPC:
        options["solver_type"] = "bh1" if config.solver_type == "bh1" else "bh2"
    return options


def alike(a: SchedulerConfig, b: SchedulerConfig) -> bool:
    """Whether every sampler computes the same by both, where it is given one grid."""
    if a.is_edm != b.is_edm or a.prediction_type != b.prediction_type:
        return False
    samplers = CLASSES.keys() - ({RULES[LCM].sampler, RULES[TCD].sampler} if a.is_edm else set())
    return all(_inside(for_sampler(a, name)) == _inside(for_sampler(b, name)) for name in samplers)


def _inside(config: SchedulerConfig) -> tuple[Any, ...]:
    """What a sampler reads of a config that has been made its own."""
    schedule = schedule_for(config)
    options = sampler_options(config) | {"schedule": None}  # the same once more
    return schedule.sigmas.tobytes(), schedule.flow, schedule.whole, schedule.sigma_data, options


def initial_scale(config: SchedulerConfig, sigmas: np.ndarray) -> float:
    """x = initial_scale * unit noise starts a sample: the sigma, or the spread of x, that the class takes."""
    sigma = float(np.max(sigmas))
    family = config.rules.family
    if family == "flow":
        return 1 + sigma
    if family == "edm":
        return (1 + sigma**2) ** 0.5
    return sigma if family == "ve" and config.spacing != "leading" else (1 + sigma**2) ** 0.5


def final_scale(config: SchedulerConfig, sigmas: np.ndarray) -> float:
    """latents = final_scale * x ends a sample: 1, unless a variance-preserving grid stops above sigma 0."""
    return (1 + float(sigmas[-1]) ** 2) ** -0.5 if config.rules.family == "vp" else 1.0
