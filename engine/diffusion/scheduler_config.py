"""A diffusers scheduler_config.json, and what each scheduler class in it means."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from engine import config as reader
from engine.types import UserError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("linspace", "leading", "trailing")
SHAPED = ("karras", "exponential")
ALIGNED = "ays"
GRIDS = (*SPACINGS, "sgm_uniform", *SHAPED, ALIGNED)


class Rules(NamedTuple):
    """What one diffusers scheduler class means: the sampler, and how it reads its options."""

    sampler: str
    spacing: str  # its default timestep_spacing
    family: str  # "vp": latents kept variance-preserving; "ve": x0 + sigma eps; "flow"; "edm": "ve" of EDMs
    reads: tuple[str, ...]  # options beyond COMMON. Others are leftovers of another class, and do nothing


COMMON = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)
SHAPES = ("use_karras_sigmas", "use_exponential_sigmas")
FINAL = "final_sigmas_type"
ORDERS = ("solver_order", "solver_type", "lower_order_final")
SOLVER = (*SHAPES, *ORDERS)
DPM = (FINAL, "algorithm_type", "euler_at_final")
EDM = ("prediction_type", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho")
DPM_SOLVER, FLOW = "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
DEIS, UNIPC = "DEISMultistepScheduler", "UniPCMultistepScheduler"
LCM, TCD = "LCMScheduler", "TCDScheduler"
EDM_DPM_SOLVER = "EDMDPMSolverMultistepScheduler"
MULTISTEP = (DPM_SOLVER, DEIS, UNIPC)  # one code in diffusers, as to the grid
RULES = {
    "DDIMScheduler": Rules("ddim", "leading", "vp", ("set_alpha_to_one",)),
    "DDPMScheduler": Rules("ddpm", "leading", "vp", ()),
    "PNDMScheduler": Rules("pndm", "leading", "vp", ("set_alpha_to_one", "skip_prk_steps")),
    DPM_SOLVER: Rules("dpmpp_2m", "linspace", "vp", (*SOLVER, *DPM)),
    DEIS: Rules("deis", "linspace", "vp", (*SOLVER, "algorithm_type")),
    UNIPC: Rules("unipc", "linspace", "vp", (*SOLVER, FINAL, "sigma_min", "sigma_max")),
    "EulerDiscreteScheduler": Rules("euler", "linspace", "ve", (*SHAPES, FINAL, "sigma_min", "sigma_max")),
    "EulerAncestralDiscreteScheduler": Rules("euler_ancestral", "linspace", "ve", ()),
    "HeunDiscreteScheduler": Rules("heun", "linspace", "ve", SHAPES),
    "LMSDiscreteScheduler": Rules("lms", "linspace", "ve", SHAPES),
    "KDPM2DiscreteScheduler": Rules("dpm_2", "linspace", "ve", SHAPES),
    "KDPM2AncestralDiscreteScheduler": Rules("dpm_2_ancestral", "linspace", "ve", SHAPES),
    "DPMSolverSDEScheduler": Rules("dpmpp_sde", "linspace", "ve", SHAPES),
    LCM: Rules("lcm", "leading", "vp", ("original_inference_steps", "timestep_scaling")),
    TCD: Rules("tcd", "leading", "vp", ("original_inference_steps",)),
    FLOW: Rules("euler", "linspace", "flow", ("shift",)),
    "EDMEulerScheduler": Rules("euler", "linspace", "edm", (*EDM, FINAL)),
    EDM_DPM_SOLVER: Rules("dpmpp_2m", "linspace", "edm", (*EDM, *ORDERS, *DPM)),
}
ON_A_TABLE = {name: rules for name, rules in RULES.items() if rules.family in ("vp", "ve")}
CLASSES = {rules.sampler: name for name, rules in ON_A_TABLE.items()} | {
    "dpmpp_2m_sde": DPM_SOLVER,
    # k-diffusion's: no class that does the same. On the grid that k-diffusion starts from
    "dpmpp_2s_ancestral": "EulerDiscreteScheduler",
    "dpmpp_3m_sde": "EulerDiscreteScheduler",
}

# Options of the originals that the engine has for these values only, and those that such values switch off.
FIXED: dict[str, tuple] = {
    "clip_sample": (False,),
    "predict_epsilon": (True, None),
    "thresholding": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "lambda_min_clipped": (-float("inf"),),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
}
# The same for options whose values depend on the class. What another class writes there, diffusers takes for
# the class's own: "bh2" is "midpoint" to DPM-Solver.
SOLVERS: dict[str, dict[str, tuple]] = {
    DPM_SOLVER: {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": (2,),
        "solver_type": (None, "midpoint", "logrho", "bh1", "bh2"),
    },
    DEIS: {
        "algorithm_type": ("deis", "dpmsolver++", "dpmsolver"),
        "solver_order": (1, 2, 3),
        "solver_type": (None, "logrho", "midpoint", "heun", "bh1", "bh2"),
        "lower_order_final": (True,),
    },
    UNIPC: {
        "solver_order": (1, 2, 3),
        "solver_type": (None, "bh1", "bh2", "midpoint", "heun", "logrho"),
        "lower_order_final": (True,),
    },
}
SOLVERS[EDM_DPM_SOLVER] = SOLVERS[DPM_SOLVER]
INERT = (
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"),
    *("tensor_format", "timestep_values"),  # of the first diffusers
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "noise_sampler_seed"),
)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """A diffusers scheduler_config.json. None stands for the class's own default."""

    class_name: str
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None  # in place of the three above
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0  # added to leading timesteps
    rescale_betas_zero_snr: bool = False  # how the model was trained: true for every class, unlike the rest
    set_alpha_to_one: bool | None = None  # the grid ends at sigma 0, else at that of timestep 0
    skip_prk_steps: bool = True  # PNDM without its Runge-Kutta start: the only one here
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    sigma_min: float | None = None  # ends of the karras and exponential grids
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"  # or "sigma_min": the grid ends at the sigma of timestep 0
    algorithm_type: str = "dpmsolver++"  # or "sde-dpmsolver++"
    solver_order: int = 2
    solver_type: str | None = None  # "bh1" or "bh2": UniPC's B(h)
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50  # of the distillation: the grid is a part of these timesteps
    timestep_scaling: float = 10.0  # of lcm's boundary condition
    shift: float = 1.0  # of flow timesteps: t -> shift t / (1 + (shift - 1) t)
    sigma_data: float = 0.5  # of an EDM: the spread of the latents that it was trained on
    sigma_schedule: str = "karras"  # of an EDM: its grid, or "exponential"
    rho: float = 7.0  # of an EDM's karras grid

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "SchedulerConfig":
        """Reads the JSON object of the file `where`.

        An absent `clip_sample` counts as false for every class: latents have no range to clip to.

        Raises:
          UserError: an unknown scheduler class or option, or a value that the engine does not implement.
        """
        name = options.get("_class_name")
        if name not in RULES:
            raise UserError(f"{where}: _class_name={name!r} is not supported; supported: {', '.join(RULES)}")
        defaults: dict[str, Any] = {}
        if name == "PNDMScheduler":
            defaults["skip_prk_steps"] = False
        if name == FLOW:
            defaults["prediction_type"] = "flow_prediction"
        if RULES[name].family == "edm":
            defaults |= {"sigma_min": 0.002, "sigma_max": 80.0}
        if name.startswith(("Heun", "KDPM2", "DPMSolverSDE", "LCM", "TCD")):
            defaults |= {"beta_start": 0.00085, "beta_end": 0.012}
        if name in (LCM, TCD):
            defaults["beta_schedule"] = "scaled_linear"
        options = {key: value for key, value in options.items() if key not in INERT}
        return reader.from_json(cls, defaults | options | {"class_name": name}, where, FIXED)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` and diffusers read: what the class reads, and any leftovers."""
        own = {"_class_name", "num_train_timesteps", *self.rules.reads}
        own |= set(COMMON) if self.class_name in ON_A_TABLE else set()
        ends = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max} if self.is_edm else {}
        default = SchedulerConfig(self.class_name, prediction_type=self.prediction_type, **ends)
        options = reader.to_json(self, self.class_name)
        del options["class_name"]
        kept = {
            name: value
            for name, value in options.items()
            if value is not None and (name in own or value != getattr(default, name))
        }
        return kept | ({"clip_sample": False} if self.rules.sampler in ("ddim", "ddpm") else {})

    def __post_init__(self):
        """Refuses, with a UserError, values that the engine does not implement."""
        predictions = ("flow_prediction",) if self.is_flow else ("epsilon", "v_prediction", "sample")
        predictions = predictions[:2] if self.is_edm else predictions
        choices: dict[str, tuple] = {
            "class_name": tuple(RULES),
            "beta_schedule": BETA_SCHEDULES,
            "prediction_type": predictions,
            "timestep_spacing": (None, *SPACINGS),
            "final_sigmas_type": ("zero", "sigma_min"),
            "sigma_schedule": SHAPED,
        } | SOLVERS.get(self.class_name, {})
        if self.class_name == "PNDMScheduler":
            choices["skip_prk_steps"] = (True,)
        if self.class_name not in ON_A_TABLE:
            choices |= {name: (False, None) for name in SHAPES}
        if self.class_name in (DPM_SOLVER, EDM_DPM_SOLVER) and self.final_sigmas_type == "sigma_min":
            choices |= {"lower_order_final": (True,), "euler_at_final": (False,)}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                supported = ", ".join(map(repr, allowed))
                raise UserError(
                    f"{name}={value!r} is not supported by {self.class_name}; supported: {supported}"
                )
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise UserError("original_inference_steps must be 1 to num_train_timesteps")
        if self.num_train_timesteps < 2 or self.shift <= 0:
            raise UserError("num_train_timesteps must be at least 2, and shift above 0")
        if self.is_edm and not 0 < (self.sigma_min or 0) < (self.sigma_max or 0):
            raise UserError("sigma_min must be above 0, and sigma_max above sigma_min")
        if min(self.sigma_data, self.rho) <= 0:
            raise UserError("sigma_data and rho must be above 0")
        if not all(0 < beta < 1 for beta in self.trained_betas or (self.beta_start, self.beta_end)):
            raise UserError("beta_start, beta_end and trained_betas must lie between 0 and 1")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"{len(self.trained_betas)} trained_betas for {self.num_train_timesteps} timesteps"
            )

    @property
    def rules(self) -> Rules:
        return RULES[self.class_name]

    @property
    def spacing(self) -> str:
        return self.timestep_spacing or self.rules.spacing

    @property
    def is_flow(self) -> bool:
        return self.class_name == FLOW

    @property
    def is_edm(self) -> bool:
        """Whether the model was trained as Karras et al. 2022 say, not on a table of noise levels."""
        return self.rules.family == "edm"

    def option(self, name: str, inert: Any) -> Any:
        """The option's value, or `inert` where the class does not read it."""
        return getattr(self, name) if name in self.rules.reads else inert


def sampler_name(config: SchedulerConfig) -> str:
    """The sampler that the config's class stands for."""
    sde = config.option("algorithm_type", "").startswith("sde")
    return "dpmpp_2m_sde" if sde else RULES[config.class_name].sampler


def for_sampler(config: SchedulerConfig, sampler: str) -> SchedulerConfig:
    """The same noise schedule with the grid of another sampler's class, as diffusers' from_config makes it.

    A flow model and an EDM keep their configs: their grids do not depend on the sampler.

    Raises:
      UserError: an unknown sampler, or one for timesteps that the model has not.
    """
    if sampler not in CLASSES:
        near = reader.nearest(sampler, CLASSES)
        raise UserError(f"sampler={sampler!r} is unknown{near}; write one of {', '.join(CLASSES)}")
    if config.is_edm and sampler in (RULES[LCM].sampler, RULES[TCD].sampler):
        raise UserError(
            f"sampler={sampler!r} is for distilled models, and this one is an EDM: write another, as "
            f"{sampler_name(config)}"
        )
    if config.class_name not in ON_A_TABLE or sampler == sampler_name(config):
        return config
    name, changes = CLASSES[sampler], {"skip_prk_steps": True}
    for option, allowed in SOLVERS.get(name, {}).items():
        if getattr(config, option) not in allowed:
            changes[option] = allowed[0]
    if name == DPM_SOLVER:
        changes["algorithm_type"] = "sde-dpmsolver++" if sampler == "dpmpp_2m_sde" else "dpmsolver++"
    return dataclasses.replace(config, class_name=name, **changes)
