"""Averages of parameters over training: exponential ones, and power functions that make others afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and
appendix C: the average of profile gamma after t steps weighs the params after step t' with

    p(t') = (gamma + 1) t'^gamma / t^(gamma+1),  0 <= t' <= t.

Its relative width is sigma_rel, the profile's standard deviation over t. Two averages of different widths,
kept in files now and then, are enough to build that of any other width after the training.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from engine.config import StageConfig
from engine.types import Params, UserError
from engine.weights import safetensors_io
from engine.weights.arrays import cast

T = TypeVar("T")

# step, from 0 -> the share that the params after it have in an average: 1 - beta
Share = Callable[[Int[Array, ""]], Array]


def shares(config: StageConfig) -> dict[str, Share]:
    """The averages of a stage: ema_0.999, ..., power_0.05, ..."""
    averages = {f"ema_{decay}": exponential(decay) for decay in config.ema}
    return averages | {power_name(width): power(width) for width in config.ema_sigma_rel}


def chosen(config: StageConfig) -> str:
    """The average that a stage ends with."""
    return f"ema_{config.ema[0]}"


def power_name(sigma_rel: float) -> str:
    return f"power_{sigma_rel}"


def exponential(decay: float) -> Share:
    """1 - decay; short averages first: the decay is at most (1 + step) / (10 + step)."""
    return lambda step: 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def power(sigma_rel: float) -> Share:
    """1 - beta_t, beta_t = (1 - 1/t)^(gamma+1) (section 3.1), in a form exact for large t = step + 1."""
    exponent = gamma_of(sigma_rel) + 1
    return lambda step: -jnp.expm1(exponent * jnp.log1p(-1.0 / (step + 1.0)))


def update(average: T, new: T, share: Array) -> T:
    """(1 - share) * average + share * new, for arrays and trees of them."""
    return jax.tree.map(lambda e, p: e + share * (p - e), average, new)


def gamma_of(sigma_rel: float) -> float:
    """The positive solution of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): algorithm 2."""
    s = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


class Snapshot(NamedTuple):
    """A power-function average in a file."""

    path: pathlib.Path
    step: int  # steps taken
    sigma_rel: float


def save_snapshots(
    folder: pathlib.Path, step: int, ema_params: dict[str, Params], config: StageConfig
) -> None:
    """Writes the power-function averages after `step` steps: FOLDER/STEP-SIGMA_REL.safetensors.

    A file has its name when it is whole. Names in it are the parameters' paths, joined with slashes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(config.ema_snapshot_dtype)
    for width in config.ema_sigma_rel:
        flat = traverse_util.flatten_dict(ema_params[power_name(width)])
        arrays = {"/".join(map(str, path)): leaf for path, leaf in flat.items()}
        file = folder / f"{step:08}-{width}.safetensors"
        unfinished = folder / f".{file.name}"
        safetensors_io.write(
            unfinished,
            {name: array.shape for name, array in arrays.items()},
            dict.fromkeys(arrays, dtype),
            lambda name, arrays=arrays: cast(np.asarray(arrays[name]), dtype, name),
        )
        unfinished.replace(file)


def snapshots(folder: pathlib.Path) -> list[Snapshot]:
    """What `save_snapshots` left in a folder, in the order of steps."""
    files = sorted(folder.glob("[0-9]*-*.safetensors"))
    return [Snapshot(file, int(step), float(width)) for file in files for step, width in [_parts(file)]]


def _parts(file: pathlib.Path) -> tuple[str, str]:
    step, _, width = file.name.removesuffix(".safetensors").partition("-")
    return step, width


def inner(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> ArrayLike:
    """The integral of the product of two profiles (algorithm 3, p_dot_p); float64."""
    t_a, gamma_a, t_b, gamma_b = (np.asarray(x, np.float64) for x in (t_a, gamma_a, t_b, gamma_b))
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    # of the profile that ends later, the exponent says how little of it the other one meets
    exponent = np.where(t_a > t_b, gamma_a, gamma_b)
    product = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return product * (first / last) ** exponent / last


def coefficients(kept: Sequence[Snapshot], sigma_rel: float, at_step: int) -> np.ndarray:
    """x such that sum_i x_i p_i is next to the profile of `sigma_rel` at `at_step`: A x = b, algorithm 3."""
    t = np.array([each.step for each in kept], np.float64)
    gamma = np.array([gamma_of(each.sigma_rel) for each in kept])
    norm = np.sqrt(inner(t, gamma, t, gamma))  # of unit length, the equations are well scaled
    A = inner(t[:, None], gamma[:, None], t, gamma) / np.outer(norm, norm)
    b = inner(t, gamma, at_step, gamma_of(sigma_rel)) / norm
    return np.linalg.lstsq(A, b, rcond=1e-13)[0] / norm


def reconstruct(kept: Sequence[Snapshot], sigma_rel: float, at_step: int) -> Params:
    """The average of width `sigma_rel` after `at_step` steps, from all snapshots up to then; float32.

    Raises:
      UserError: there is no snapshot of that step, or a file of them cannot be read.
    """
    kept = [each for each in kept if each.step <= at_step]
    if not any(each.step == at_step for each in kept):
        raise UserError(f"no snapshot of step {at_step}; the last before it is of step {_newest(kept)}")
    sums: dict[str, np.ndarray] = {}
    for each, x in zip(kept, coefficients(kept, sigma_rel, at_step), strict=True):
        header = safetensors_io.read_header(each.path)
        with each.path.open("rb") as file:
            for name, tensor in header.items():
                values = safetensors_io.read_tensor(file, name, tensor).astype(np.float64)
                sums[name] = sums.get(name, 0.0) + x * values
    flat = {_path(name): array.astype(np.float32) for name, array in sums.items()}
    return traverse_util.unflatten_dict(flat)


def _newest(kept: Sequence[Snapshot]) -> str:
    return str(max(each.step for each in kept)) if kept else "none"


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("/"))
