"""k-diffusion's samplers that PyTorch diffusers lacks: whole runs against their published updates, in numpy.

Written in their t = -log sigma, as published; the engine's are in sigma, and carry other memories. TCD's
spread on images that are N(MU, S^2) is here, too: with a model that was not distilled it has one of its own.
"""

from itertools import pairwise

import numpy as np
import pytest

from engine.diffusion.noise import image_keys, step_noise
from tests.diffusion.test_samplers import MU, SIGMA_MAX, S, denoise, falling, noise, run

STEPS, SHAPE = 6, (2, 2, 1)


def ancestral_step(sigma, sigma_next, eta):
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def dpmpp_2s_ancestral(x, sigmas, z, eta):
    for k, (sigma, sigma_next) in enumerate(pairwise(sigmas[:-1])):
        D = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        t, t_next = -np.log(sigma), -np.log(down)
        h = t_next - t
        s = t + h / 2
        x_2 = np.exp(-s) / np.exp(-t) * x - np.expm1(-h / 2) * D
        x = np.exp(-t_next) / np.exp(-t) * x - np.expm1(-h) * denoise(x_2, np.exp(-s)) + up * z[2 * k + 1]
    return denoise(x, sigmas[-2])


def dpmpp_sde(x, sigmas, z, eta):
    for k, (sigma, sigma_next) in enumerate(pairwise(sigmas[:-1])):
        t, t_next = -np.log(sigma), -np.log(sigma_next)
        middle = np.exp(-(t + (t_next - t) / 2))
        W = np.sqrt(sigma - middle) * z[2 * k]  # the Brownian path, from sigma down
        down, up = ancestral_step(sigma, middle, eta)
        x_2 = down / sigma * x - np.expm1(t + np.log(down)) * denoise(x, sigma)
        x_2 += up * W / np.sqrt(sigma - middle)
        W += np.sqrt(middle - sigma_next) * z[2 * k + 1]
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = down / sigma * x - np.expm1(t + np.log(down)) * denoise(x_2, middle)
        x += up * W / np.sqrt(sigma - sigma_next)
    return denoise(x, sigmas[-2])


def dpmpp_3m_sde(x, sigmas, z, eta):
    Ds, hs = [], []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas[:-1])):
        Ds.append(denoise(x, sigma))
        hs.append(-np.log(sigma_next) + np.log(sigma))
        h = hs[-1] * (1 + eta)
        x = np.exp(-h) * x - np.expm1(-h) * Ds[-1]
        phi_2 = np.expm1(-h) / h + 1
        if i >= 2:
            r0, r1 = hs[-2] / hs[-1], hs[-3] / hs[-1]
            d1_0, d1_1 = (Ds[-1] - Ds[-2]) / r0, (Ds[-2] - Ds[-3]) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h - 0.5) * d2
        elif i == 1:
            x = x + phi_2 * (Ds[-1] - Ds[-2]) / (hs[-2] / hs[-1])
        x = x + z[i] * sigma_next * np.sqrt(-np.expm1(-2 * hs[-1] * eta))
    return denoise(x, sigmas[-2])


@pytest.mark.parametrize("published", [dpmpp_2s_ancestral, dpmpp_sde, dpmpp_3m_sde])
def test_run_equals_the_published_update(published):
    keys, sigmas, eta = image_keys(3, range(2)), falling(STEPS), 0.5
    x = noise(keys, SHAPE)
    z = [np.asarray(step_noise(keys, i, SHAPE), np.float64) for i in range(2 * STEPS)]
    expected = published(np.asarray(x, np.float64), np.asarray(sigmas, np.float64), z, eta)
    np.testing.assert_allclose(
        run(published.__name__, x, sigmas, keys, (("eta", eta),))[0], expected, atol=2e-5
    )


def test_spread_of_tcd():
    """x' - MU is linear in x - MU, so that its variance is known after each step. 65,536 values, 8 steps."""
    keys, sigmas = image_keys(1, range(16)), np.asarray(falling(8), np.float64)
    variance, eta = S**2 + SIGMA_MAX**2, 0.3
    for sigma, sigma_next in pairwise(sigmas):
        s = (1 - eta) * sigma_next
        share = S**2 / (S**2 + sigma**2)  # of x - MU in D - MU
        variance *= (share + s / sigma * (1 - share)) ** 2
        variance += sigma_next**2 - s**2
    last, _ = run("tcd", noise(keys, (32, 32, 4)), falling(8), keys, (("eta", eta),))
    assert float(last.mean()) == pytest.approx(MU, abs=0.01)
    assert float(last.std()) == pytest.approx(variance**0.5, rel=0.015)
