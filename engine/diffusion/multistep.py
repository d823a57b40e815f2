"""Samplers that remember: each step uses what the network said in the steps before it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engine.diffusion.interpolation import gauss_legendre, means, past
from engine.diffusion.noise import step_noise
from engine.diffusion.steps import Carry, Index, InitStep, Scalar, Sigmas, Trace, remembering
from engine.types import Denoise, Keys, Latents


def dpmpp_2m(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, second order, multistep.

    With lambda = -log sigma and h = log(sigma / sigma'), x' = exp(-h) x + (1 - exp(-h)) D_i.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, sigma, sigma_next = carry.x, sigmas[i], sigmas[i + 1]
        D = denoise(x, sigma)
        D_i = D + _slope(sigmas, i) * (D - carry.memory[0])
        x = D_i + sigma_next / sigma * (x - D_i)
        return Carry(x, (D,)), Trace(x, D)

    return remembering(1), step


def dpmpp_2m_sde(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """The same for the reverse SDE: x' = exp(-2h) x + (1 - exp(-2h)) D_i + sigma' sqrt(1 - exp(-2h)) z.

    Lu et al. 2022, appendix: SDE-DPM-Solver++(2M); at first order it is DDPM.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, ratio = carry.x, sigmas[i + 1] / sigmas[i]
        D = denoise(x, sigmas[i])
        D_i = D + _slope(sigmas, i) * (D - carry.memory[0])
        noise = step_noise(keys, i, x.shape[1:])
        x = D_i + ratio**2 * (x - D_i) + sigmas[i + 1] * jnp.sqrt(1 - ratio**2) * noise
        return Carry(x, (D,)), Trace(x, D)

    return remembering(1), step


def _slope(sigmas: Sigmas, i: Index) -> Float[Array, ""]:
    """1 / (2 r) = h / (2 h_before): how far DPM-Solver++(2M) extrapolates D to the middle of the step.

    0, which makes the step first order, at the first step; at the last if it ends at sigma 0 (where h is
    infinite) or the run is shorter than 15 steps (diffusers' `lower_order_final`); after a step of no length.
    """
    n = sigmas.shape[0] - 1
    before, sigma, after = sigmas[jnp.maximum(i - 1, 0)], sigmas[i], sigmas[i + 1]
    second_order = (before > sigma) & (after > 0) & ((i < n - 1) | (n >= 15))
    h_before = jnp.log(jnp.where(second_order, before / sigma, 2))
    h = jnp.log(jnp.where(second_order, sigma / after, 1))
    return h / (2 * h_before)


def dpmpp_3m_sde(denoise: Denoise, sigmas: Sigmas, keys: Keys, eta: float = 1.0) -> InitStep:
    """SDE-DPM-Solver++(3M), as k-diffusion's `sample_dpmpp_3m_sde` has it; eta 0 is the ODE.

    With h = (1 + eta) log(sigma / sigma'), and D's first and second divided differences d1 and d2 at sigma in
    units of the step,

        x' = D + exp(-h) (x - D) + phi_2 d1 - phi_3 d2 + sigma' sqrt(1 - (sigma' / sigma)^(2 eta)) z
        phi_2 = 1 - (1 - exp(-h)) / h,    phi_3 = phi_2 / h - 1/2

    The quadratic through three outputs would have 2 phi_3. The published step, which is this one, is of order
    2 for that.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, (D_1, D_2), ratio = carry.x, carry.memory, sigmas[i + 1] / sigmas[i]
        D = denoise(x, sigmas[i])
        nodes, length = past(sigmas, i, 3)
        order = jnp.where((ratio > 0) & (ratio < 1), length, 1)
        step_ = _h(sigmas, i)
        r0 = jnp.where(order > 1, jnp.log(nodes[1] / nodes[0]), 1) / step_
        r1 = jnp.where(order > 2, jnp.log(nodes[2] / nodes[1]), 1) / step_
        slope, slope_before = (D - D_1) / r0, (D_1 - D_2) / r1
        d2 = jnp.where(order > 2, (slope - slope_before) / (r0 + r1), 0)
        d1 = jnp.where(order > 1, slope, 0) + r0 * d2

        h = (1 + eta) * step_
        phi_2 = 1 + jnp.expm1(-h) / h
        x = D + ratio ** (1 + eta) * (x - D) + phi_2 * d1 - (phi_2 / h - 1 / 2) * d2
        if eta > 0:
            x += sigmas[i + 1] * jnp.sqrt(1 - ratio ** (2 * eta)) * step_noise(keys, i, x.shape[1:])
        return Carry(x, (D, D_1)), Trace(x, D)

    return remembering(2), step


# Rows: the first step, its correction, and two, three, four past slopes; columns: newest slope first.
PLMS = (
    (1, 0, 0, 0),
    (1 / 2, -1 / 2, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(denoise: Denoise, sigmas: Sigmas, keys: Keys) -> InitStep:
    """Liu et al. 2022 (PNDM), equations 9 and 12: Adams-Bashforth on eps, started without Runge-Kutta (PLMS).

    Equation 9, its transfer step, is x' = x + (sigma' - sigma) eps in this scaling. The first interval takes
    two steps: to its end with the slope eps_0 of its start, then again with the mean of eps_0 and eps_1 (the
    slope there), which adds (sigma' - sigma) (eps_1 - eps_0) / 2. eps_1 is then forgotten: step 2 evaluates
    it anew. From then on step i goes from sigma_{i-1} to sigma_i.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        x, k = carry.x, jnp.maximum(i - 1, 0)
        sigma = jnp.where(i == 1, sigmas[1], sigmas[k])
        D = denoise(x, sigma)
        eps = ((x - D) / sigma, *carry.memory)
        weights = jnp.asarray(PLMS, x.dtype)[jnp.minimum(i, 4)]
        x += (sigmas[k + 1] - sigmas[k]) * sum(w * e for w, e in zip(weights, eps, strict=True))
        memory = tuple(jnp.where(i == 1, old, new) for old, new in zip(eps[1:], eps[:3], strict=True))
        return Carry(x, memory), Trace(x, D)

    return remembering(3), step


def lms(denoise: Denoise, sigmas: Sigmas, keys: Keys, order: int = 4) -> InitStep:
    """Adams-Bashforth on eps over the grid as it is: the polynomial in sigma through the last `order` slopes.

    x' = x + integral from sigma to sigma' of sum_k eps_{i-k} L_k(tau) dtau (k-diffusion's `sample_lms`;
    Katherine Crowson). Orders 1, 2, ... start it.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        nodes, length = past(sigmas, i, order)
        s, weights = gauss_legendre(sigmas)
        tau = nodes[0] + s * (sigmas[i + 1] - nodes[0])
        return _along_eps(denoise, sigmas, carry, i, means(nodes, length, tau, weights))

    return remembering(order - 1), step


def deis(denoise: Denoise, sigmas: Sigmas, keys: Keys, solver_order: int = 2) -> InitStep:
    """Zhang & Chen 2023 (DEIS), section 3.3: as lms, but the polynomial is one in log sigma (log-rho AB).

    The last steps are of lower order, see `_highest_order`.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        nodes, length = past(sigmas, i, solver_order)
        length = jnp.minimum(length, _highest_order(sigmas, i))
        (s, weights), h = gauss_legendre(sigmas), _h(sigmas, i)
        u = jnp.log(nodes[0]) - s * h
        w = weights * jnp.exp(-s * h)  # dtau = tau du
        omega = means([jnp.log(node) for node in nodes], length, u, w)
        return _along_eps(denoise, sigmas, carry, i, omega)

    return remembering(solver_order - 1), step


def _along_eps(
    denoise: Denoise, sigmas: Sigmas, carry: Carry, i: Index, omega: list[Scalar]
) -> tuple[Carry, Trace]:
    """x' = x + (sigma' - sigma) sum_k omega_k eps_{i-k}: Euler's step, and what the past slopes change."""
    x, sigma, sigma_next = carry.x, sigmas[i], sigmas[i + 1]
    D = denoise(x, sigma)
    eps = (x - D) / sigma
    change = _mean(omega, (eps, *carry.memory)) - eps
    x = D + sigma_next / sigma * (x - D) + (sigma_next - sigma) * change
    return Carry(x, (eps, *carry.memory)[:-1]), Trace(x, D)


def _mean(omega: list[Scalar], values: tuple[Latents, ...]) -> Latents:
    """sum_k omega_k values_k where the weights sum to 1: exactly the first value where the others' are 0."""
    first = values[0]
    changes = (w * (value - first) for w, value in zip(omega[1:], values[1:], strict=True))
    return sum(changes, start=first)


def _h(sigmas: Sigmas, i: Index) -> Scalar:
    """lambda' - lambda = log(sigma / sigma'); 1 where it is infinite or 0, and the step of first order."""
    usual = (sigmas[i + 1] > 0) & (sigmas[i + 1] < sigmas[i])
    return jnp.where(usual, jnp.log(sigmas[i] / jnp.where(usual, sigmas[i + 1], 1)), 1)


def _highest_order(sigmas: Sigmas, i: Index) -> Int[Array, ""]:
    """Of step i by diffusers' `lower_order_final`.

    In runs shorter than 15 steps the last has order 1, the one before it 2. A step to sigma 0, where h is
    infinite, has order 1 in any run.
    """
    n = sigmas.shape[0] - 1
    return jnp.where((n < 15) | (sigmas[i + 1] == 0), n - i, n)


def unipc(
    denoise: Denoise, sigmas: Sigmas, keys: Keys, solver_order: int = 2, solver_type: str = "bh2"
) -> InitStep:
    """Zhao et al. 2023 (UniPC), algorithms 1 and 2, for x0: a predictor, corrected in the next step.

    With lambda = -log sigma, the exact x' is D_mean + exp(-h) (x - D_mean), where D_mean is the mean of D
    over the step under the weight exp(lambda). UniP-p, the predictor, puts in D's place the polynomial
    through the last p outputs. UniC-p, the corrector, has the output at x' besides, which the next step asks
    for anyway: so step i corrects x_i, and predicts x_{i+1} from there.
    """

    def step(carry: Carry, i: Index) -> tuple[Carry, Trace]:
        D, before, back = denoise(carry.x, sigmas[i]), carry.memory, jnp.maximum(i - 1, 0)
        predictor, corrector = _unified(sigmas, back, solver_order, solver_type)
        error = _mean(corrector, (D, *before)) - _mean(predictor, before)
        x = carry.x + jnp.where(i > 0, (1 - sigmas[i] / sigmas[back]) * error, 0)

        predictor, _ = _unified(sigmas, i, solver_order, solver_type)
        outputs = (D, *before)[:solver_order]
        D_mean = _mean(predictor, outputs)
        x = D_mean + sigmas[i + 1] / sigmas[i] * (x - D_mean)
        return Carry(x, outputs), Trace(x, D)

    return remembering(solver_order), step


def _unified(sigmas: Sigmas, i: Index, p: int, solver_type: str) -> tuple[list[Scalar], list[Scalar]]:
    """Weights for step i of the outputs D_i, D_{i-1}, ... (UniP) and of D_{i+1}, D_i, ... (UniC).

    They solve equation 8 of the paper, in which B(h) cancels out: what solves it are the means of Lagrange's
    polynomials. B(h) only shows in UniP-2 and UniC-1, where the paper has 1/2 in place of the solution.
    The order rises from 1 to p, and falls to 1 again at the end of any run.
    """
    nodes, length = past(sigmas, i, p)
    order, h = jnp.minimum(length, sigmas.shape[0] - 1 - i), _h(sigmas, i)
    lambdas = [-jnp.log(node) for node in nodes]
    s, weights = gauss_legendre(sigmas)
    u, w = lambdas[0] + s * h, weights * jnp.exp((s - 1) * h)
    half = (h / -jnp.expm1(-h) if solver_type == "bh1" else jnp.ones_like(h)) / 2  # B(h) / (2 (exp(-h) - 1))

    predictor = means(lambdas, order, u, w)
    if p > 1:
        r = jnp.where(order == 2, lambdas[1] - lambdas[0], -1) / h
        halved = [1 - half / r, half / r, *[jnp.zeros_like(h)] * (p - 2)]
        predictor = [jnp.where(order == 2, a, b) for a, b in zip(halved, predictor, strict=True)]
    corrector = means([lambdas[0] + h, *lambdas], order + 1, u, w)
    halved = [half, 1 - half, *[jnp.zeros_like(h)] * (p - 1)]
    return predictor, [jnp.where(order == 1, a, b) for a, b in zip(halved, corrector, strict=True)]
