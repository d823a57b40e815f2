"""The Fréchet distance of two sets of features, from their means and covariances (Heusel et al. 2017).

    d² = |m1 - m2|² + Tr(S1 + S2 - 2 (S1 S2)^½)

It is the distance of two Gaussians (Dowson & Landau 1982). The features may be those of any network: with
InceptionV3's it is FID. Everything is float64 on the host.
"""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.linalg.lapack import dpstrf as pstrf

from engine.types import UserError
from engine.weights.files import new_file

BLOCK = 1024  # rows whose covariance is taken at once: a covariance of 2048 features is 32 MB to go through
RECOMMENDED = 50_000  # pictures on each side in papers


class Moments(NamedTuple):
    """What the distance knows of a set of features."""

    n: int | None  # pictures; None where a file does not say
    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]  # unbiased, over n - 1; zeros for one picture

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan et al. 1979), without the difference of large numbers."""
        if self.n is None or other.n is None:
            raise ValueError("sets of unknown sizes cannot be merged")
        n = self.n + other.n
        step = other.mean - self.mean
        scatter = self.covariance * (self.n - 1) + other.covariance * (other.n - 1)
        scatter += np.outer(step, step) * (self.n * other.n / n)
        return Moments(n, self.mean + step * (other.n / n), scatter / (n - 1))


# ---- taken


def moments_of(batches: Iterable[Float[np.ndarray, "_ D"]]) -> Moments:
    """Of the rows of all batches, few of which are in memory at a time.

    Raises:
      UserError: there are none.
    """
    total = None
    for block in _blocks(batches):
        x = block.astype(np.float64)
        mean = x.mean(0)
        x -= mean
        found = Moments(len(x), mean, x.T @ x / max(len(x) - 1, 1))
        total = found if total is None else total.merge(found)
    if total is None:
        raise UserError("no pictures to take statistics of: give 2 or more")
    return total


def _blocks(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same rows, about BLOCK of them at once."""
    waiting, rows = [], 0
    for batch in batches:
        waiting.append(batch)
        rows += len(batch)
        if rows >= BLOCK:
            yield np.concatenate(waiting)
            waiting, rows = [], 0
    if rows:
        yield np.concatenate(waiting)


# ---- compared


def frechet_distance(a: Moments, b: Moments) -> float:
    """d² above: 0 for equal moments, and never less.

    S1 S2 has the eigenvalues of S1^½ S2 S1^½, which is symmetric, and these are the squares of the singular
    values of S1^½ S2^½, whose sum is the trace. So no root is taken of the 1e-16 that rounding makes of zero:
    with fewer pictures than features most eigenvalues are zero, and thousands of such roots would count.

    Raises:
      UserError: fewer than two pictures, other features, or statistics that are none.
    """
    for moments in (a, b):
        check(moments)
    if len(a.mean) != len(b.mean):
        raise UserError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared: "
            "take both with the same network"
        )
    singular = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False)
    step = a.mean - b.mean
    distance = step @ step + np.trace(a.covariance) + np.trace(b.covariance) - 2 * singular.sum()
    return max(float(distance), 0.0)


def _root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D R"]:
    """A root with root root^T = covariance, R its rank: S^½ but for a rotation and columns of zeros.

    Singular values of products with it are those with S^½. Cholesky's factor with pivots (LAPACK's pstrf)
    is one; it ends where what is left is rounding, D eps max(diagonal), and takes an eighth of the time of
    eigenvalues at 2048 features, far less where there are few pictures.
    """
    factor, pivots, rank, _ = pstrf(covariance, lower=1)
    root = np.empty((len(covariance), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return root


def check(moments: Moments) -> None:
    """Raises UserError where no distance can be taken: fewer than two pictures, or numbers that are none."""
    if moments.n is not None and moments.n < 2:
        raise UserError(f"{moments.n} picture has no covariance: give 2 or more, {RECOMMENDED} for a paper")
    if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
        raise UserError("statistics hold a NaN or an infinity: take them again, from pictures that are sound")


def shortage(moments: Moments, what: str) -> str | None:
    """A warning, one line, where there are too few pictures for their features; None where there are enough.

    Args:
      what: how the message names the set, such as "the drawn pictures".
    """
    features = len(moments.mean)
    if moments.n is None or moments.n > features:
        return None
    return (
        f"{what} are {moments.n}, for {features} features: their covariance is singular, and the distance "
        f"larger than that of more pictures would be; take {features + 1} or more, {RECOMMENDED} for a paper"
    )


# ---- kept


def save(path: str | os.PathLike, moments: Moments) -> None:
    """Writes FILE.npz with mu, sigma and n, as pytorch-fid does and reads but for n; whole or not at all.

    Raises:
      UserError: another ending.
      OSError: no space left, or the place cannot be written.
    """
    arrays = {"mu": moments.mean, "sigma": moments.covariance}
    if moments.n is not None:
        arrays["n"] = np.int64(moments.n)
    with new_file(_npz(path)) as new, open(new, "wb") as file:
        np.savez(file, **arrays)


def load(path: str | os.PathLike) -> Moments:
    """Reads what `save` or pytorch-fid wrote.

    Raises:
      UserError: no such file, a broken one, or one without statistics.
    """
    path = _npz(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "n") if name in file}
    except FileNotFoundError:
        raise UserError(f"no statistics {path}: write the path of a .npz file that exists") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is broken, or no .npz of arrays ({error}): make or fetch it again") from None
    return _moments(path, arrays)


def _moments(path: Path, arrays: dict[str, np.ndarray]) -> Moments:
    """The arrays of a file; UserError unless they are statistics."""
    shapes = {name: array.shape for name, array in arrays.items()}
    D = shapes.get("mu", ())
    if len(D) != 1 or shapes.get("sigma") != D * 2 or shapes.get("n", ()) != ():
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "neither"
        raise UserError(f"{path} holds no statistics, mu (D,) and sigma (D, D); it holds {found}")
    if any(array.dtype.kind not in "fiu" for array in arrays.values()):
        raise UserError(f"{path}: mu and sigma are no numbers")
    mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-3 * np.abs(covariance).max(initial=0)):
        raise UserError(f"{path}: sigma is not symmetric, so it is no covariance")
    return Moments(int(arrays["n"]) if "n" in arrays else None, mean, covariance)


def _npz(path: str | os.PathLike) -> Path:
    path = Path(os.path.expanduser(path))
    if path.suffix != ".npz":
        raise UserError(f"{path}: statistics are kept in a .npz file; write {path.stem}.npz")
    return path
