"""The Fréchet distance: closed forms, the usual programs' on the same features, and files."""

import numpy as np
import pytest
import scipy.linalg

from engine.evaluate import frechet
from engine.evaluate.frechet import Moments, frechet_distance, load, moments_of, save, shortage
from engine.types import UserError


def features(n: int, d: int, seed: int, offset: float = 0.0) -> np.ndarray:
    """Correlated, and of scales from 1 to 0.03, as those of networks are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / d**0.5
    return (mixed * np.logspace(0, -1.5, d) + offset + 0.3 * rng.standard_normal(d)).astype(np.float32)


def theirs(a: np.ndarray, b: np.ndarray) -> float:
    """As torch-fidelity and pytorch-fid compute it: by a root of the product of the covariances."""
    (mu, sigma), (nu, tau) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in (a.astype(np.float64), b.astype(np.float64))
    )
    root = scipy.linalg.sqrtm(sigma @ tau)
    return float(np.square(mu - nu).sum() + np.trace(sigma) + np.trace(tau) - 2 * np.trace(root.real))


def assert_equal(found: Moments, expected: Moments, tolerance: float = 1e-12) -> None:
    assert found.n == expected.n
    np.testing.assert_allclose(found.mean, expected.mean, rtol=tolerance, atol=tolerance)
    scale = np.abs(expected.covariance).max()
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=0, atol=tolerance * scale)


# ---- moments


@pytest.mark.parametrize("block", [1, 7, 40, 1024])
def test_moments_are_those_of_numpy(block, monkeypatch):
    """However the rows come, and far from zero, where a sum of squares would lose them."""
    monkeypatch.setattr(frechet, "BLOCK", block)
    x = features(101, 12, 0, offset=1e4)
    found = moments_of(np.split(x, [1, 1, 4, 20, 90]))
    exact = x.astype(np.float64)
    assert_equal(found, Moments(101, exact.mean(0), np.cov(exact, rowvar=False)))


def test_merged_parts_are_the_whole():
    x = features(60, 9, 1, offset=100)
    one, few, many = (moments_of([part]) for part in np.split(x, [1, 5]))
    whole = moments_of([x])
    assert_equal(one.merge(few).merge(many), whole)
    assert_equal(many.merge(few.merge(one)), whole)


def test_sets_of_unknown_size_are_not_merged():
    known = moments_of([features(5, 3, 0)])
    with pytest.raises(ValueError, match="unknown"):
        known.merge(known._replace(n=None))


# ---- distances


@pytest.mark.parametrize("n", [400, 40])
def test_distance_is_that_of_the_usual_programs(n):
    """Also with fewer pictures than features, where its own rounding is larger."""
    a, b = features(n, 64, 2), features(n + 30, 64, 3)
    found = frechet_distance(moments_of([a]), moments_of([b]))
    assert found > 0.1
    assert found == pytest.approx(theirs(a, b), rel=1e-9 if n > 64 else 1e-6)


@pytest.mark.parametrize("sizes", [(20, 30), (20, 500), (500, 20), (500, 400), (2, 2)])
def test_distance_of_few_pictures(sizes):
    """With S = X^T X of centred rows X, the trace is the sum of the singular values of X1 X2^T: nothing that
    should be zero is in the way."""
    a, b = (features(n, 64, n + i).astype(np.float64) for i, n in enumerate(sizes))
    one, two = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    shared = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    step = a.mean(0) - b.mean(0)
    exact = step @ step + np.square(one).sum() + np.square(two).sum() - 2 * shared
    assert frechet_distance(moments_of([a]), moments_of([b])) == pytest.approx(exact, rel=1e-12)


def test_distance_of_gaussians_with_the_same_axes():
    """Covariances that commute: |m1 - m2|² + the squared differences of the standard deviations."""
    rng = np.random.default_rng(4)
    axes = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    deviations = rng.uniform(0, 3, (2, 20))
    deviations[0, :5] = deviations[1, 3:8] = 0  # both are singular, and not in the same directions
    means = rng.standard_normal((2, 20))
    a, b = (Moments(None, m, axes * s**2 @ axes.T) for m, s in zip(means, deviations, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_distance_of_equal_sets_is_zero():
    """In singular ones too: the root of what rounding makes of zero would be 1e-8, for each feature."""
    for n in (300, 20):
        moments = moments_of([features(n, 64, 5)])
        assert 0 <= frechet_distance(moments, moments) < 1e-12 * np.trace(moments.covariance) * 64


def test_a_shift_alone_is_its_square():
    moments = moments_of([features(50, 8, 6)])
    moved = moments._replace(mean=moments.mean + 2)
    assert frechet_distance(moments, moved) == pytest.approx(4 * 8)


def test_pictures_that_are_all_the_same():
    one, other = (moments_of([np.full((3, 8), value, np.float32)]) for value in (1, 3))
    assert frechet_distance(one, other) == pytest.approx(4 * 8)


def test_too_few_pictures():
    x = features(9, 8, 7)
    enough, eight, one = (moments_of([x[:n]]) for n in (9, 8, 1))
    with pytest.raises(UserError, match=r"^1 picture has no covariance: give 2 or more"):
        frechet_distance(enough, one)
    with pytest.raises(UserError, match="no pictures"):
        moments_of([x[:0]])
    frechet_distance(enough, moments_of([x[:2]]))
    assert shortage(enough, "the drawn pictures") is None
    assert shortage(enough._replace(n=None), "the drawn pictures") is None
    warning = shortage(eight, "the drawn pictures")
    assert warning.startswith("the drawn pictures are 8, for 8 features") and "take 9 or more" in warning
    assert "\n" not in warning


def test_what_cannot_be_compared():
    a, b = moments_of([features(9, 8, 8)]), moments_of([features(9, 7, 8)])
    with pytest.raises(UserError, match="8 and of 7 features"):
        frechet_distance(a, b)
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(a, a._replace(mean=a.mean * np.nan))


# ---- files


def test_a_file_gives_back_the_same(tmp_path):
    moments = moments_of([features(9, 4, 9)])
    file = tmp_path / "new" / "reference.npz"
    save(file, moments)
    found = load(file)
    assert found.n == 9
    np.testing.assert_array_equal(found.mean, moments.mean)
    np.testing.assert_array_equal(found.covariance, moments.covariance)
    assert [path.name for path in file.parent.iterdir()] == ["reference.npz"]
    save(file, moments._replace(n=None))
    assert load(file).n is None


def test_the_file_of_pytorch_fid(tmp_path):
    """It keeps mu and sigma, by name."""
    moments = moments_of([features(9, 4, 10)])
    np.savez(tmp_path / "a.npz", mu=moments.mean.astype(np.float32), sigma=moments.covariance)
    found = load(tmp_path / "a.npz")
    assert found.n is None and found.mean.dtype == found.covariance.dtype == np.float64
    assert frechet_distance(found, moments) < 1e-10


TWO = np.eye(2)
BAD = {
    "mu and sigma of other sizes": ({"mu": np.zeros(3), "sigma": TWO}, r"it holds mu \(3,\), sigma \(2, 2\)"),
    "no sigma": ({"mu": np.zeros(2)}, r"it holds mu \(2,\)"),
    "neither": ({"x": np.zeros(2)}, "it holds neither"),
    "words": ({"mu": np.array(["a", "b"]), "sigma": TWO}, "no numbers"),
    "no covariance": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 9.0], [0.0, 1.0]])}, "not symmetric"),
    "a pickle inside": ({"mu": np.array([{}, {}], object), "sigma": TWO}, "broken, or no .npz"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_without_statistics(name, tmp_path):
    arrays, message = BAD[name]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "a.npz")
    assert "\n" not in str(error.value)


def test_files_that_are_broken(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(UserError, match="no statistics"):
        load(file)
    save(file, moments_of([features(9, 4, 9)]))
    whole = file.read_bytes()
    for data in (b"", b"mu", whole[: len(whole) // 2], b"\x80\x04K\x01.", b"\x93NUMPY"):
        file.write_bytes(data)
        with pytest.raises(UserError, match="broken"):
            load(file)
    with open(file, "wb") as opened:
        np.save(opened, np.zeros(2))  # an .npy under the other's name
    with pytest.raises(UserError, match="broken"):
        load(file)
    with pytest.raises(UserError, match=r"write reference\.npz"):
        save(tmp_path / "reference.json", Moments(2, np.zeros(1), np.eye(1)))
