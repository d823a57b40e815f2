"""What linear multistep samplers share: the polynomial through past outputs of the network, and its mean.

With Lagrange's L_k (1 at node k, 0 at the others), the polynomial through values f_k at the nodes is
sum_k f_k L_k(u). A sampler needs the weights of its mean over the step,

    omega_k = integral L_k w du / integral w du

under a positive weight w. They sum to 1. Gauss and Legendre's points give the integrals, to rounding: all
terms of the sums over w are positive, where closed forms cancel on fine grids.
"""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engine.diffusion.steps import Index, Scalar, Sigmas

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(24)  # exact for exp(h s) to float32, h up to 30


def gauss_legendre(sigmas: Sigmas) -> tuple[Float[Array, " Q"], Float[Array, " Q"]]:
    """Points between 0 and 1, and their weights, which sum to 1."""
    return jnp.asarray((1 + POINTS) / 2, sigmas.dtype), jnp.asarray(WEIGHTS / 2, sigmas.dtype)


def past(sigmas: Sigmas, i: Index, order: int) -> tuple[list[Scalar], Int[Array, ""]]:
    """sigma_i, sigma_{i-1}, ... (`order` of them), and how many of these a polynomial can go through.

    Those are the ones before the start of the run, or before a step of no length, which cannot be nodes; in
    their places stand other numbers.
    """
    nodes = [sigmas[jnp.maximum(i - k, 0)] for k in range(order)]
    falling = jnp.stack([jnp.asarray(True)] + [a < b for a, b in pairwise(nodes)])
    return nodes, jnp.cumprod(falling).sum()


def means(
    nodes: list[Scalar], order: Int[Array, ""], u: Float[Array, " Q"], w: Float[Array, " Q"]
) -> list[Scalar]:
    """omega_k for each node: the polynomial goes through the first `order` of them, the others' are 0.

    Args:
      u: the sampler's variable at the points of `gauss_legendre`.
      w: the weight there, times theirs.
    """
    w = w / w.sum()
    omega = []
    for k, node in enumerate(nodes):
        L = jnp.where(k < order, 1.0, 0.0)
        for j, other in enumerate(nodes):
            if j != k:
                used = (j < order) & (k < order)
                L *= jnp.where(used, (u - other) / jnp.where(used, node - other, 1), 1)
        omega.append((w * L).sum())
    return omega
