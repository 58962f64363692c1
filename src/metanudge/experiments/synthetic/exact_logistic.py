r"""Logistic tasks solved exactly, for many θ or many ν at once: Newton's method on closed-form derivatives.

.. math::
    \nabla \ell(\phi) = \tfrac1n \sum_j (\sigma_j - y_j) \, x_j, \qquad
    \nabla^2 \ell(\phi) = \tfrac1n \sum_j \sigma_j (1 - \sigma_j) \, x_j x_j^\top, \qquad
    \sigma_j = \sigma(\langle x_j, \phi \rangle)

The same numbers as ``ExactMetaObjective`` gives (a test holds them to 1e-12 of each other), for whole trajectories in
the time it takes for a point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metanudge.errors import NonFiniteError
from metanudge.types import Batch, Tasks


def derivatives(batch: Batch, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient ``[T, N, d]`` and Hessian ``[T, N, d, d]`` of the mean logistic loss at ``phi`` ``[T, N, d]``."""
    x, y = batch.inputs, batch.targets.unsqueeze(1)
    chance = torch.sigmoid(phi @ x.mT)
    gradient = (chance - y) @ x
    hessian = torch.einsum("tnk,tkd,tke->tnde", chance * (1 - chance), x, x)
    return gradient / x.shape[1], hessian / x.shape[1]


def nudged_solutions(tasks: Tasks, theta: Tensor, prox: float, nus: Tensor) -> Tensor:
    """φ_i(θ, ν) = argmin fhat_i + ν f_i + λ/2 ||· - θ||², ``[T, N, d]``.

    Args:
        tasks: T logistic tasks.
        theta: One θ, ``[d]``, or one for every ν, ``[N, d]``.
        prox: λ.
        nus: ν, ``[N]``; negative ones small enough to leave the problem convex.

    Raises:
        NonFiniteError: Newton's method did not converge.
    """
    nu = nus[:, None]
    eye = torch.eye(theta.shape[-1], dtype=theta.dtype)
    phi = theta.expand(tasks.support.inputs.shape[0], len(nus), -1)
    for _ in range(50):
        (pull, curvature), (slope, bend) = derivatives(tasks.support, phi), derivatives(tasks.query, phi)
        force = pull + nu * slope + prox * (phi - theta)
        move: Tensor = torch.linalg.solve(curvature + nu[..., None] * bend + prox * eye, force)
        phi = torch.sub(phi, move)
        if float(move.abs().max()) < 1e-10:  # quadratic convergence: the next move would be below round-off
            return phi
    raise NonFiniteError("Newton's method did not converge in 50 steps; are the nudges too large?")


def meta_gradients(tasks: Tasks, thetas: Tensor, prox: float) -> Tensor:
    """∇F(θ) = mean_i λ (∇²fhat_i(φ_i) + λI)⁻¹ ∇f_i(φ_i), ``[N, d]`` for ``thetas`` ``[N, d]``."""
    phi = nudged_solutions(tasks, thetas, prox, torch.zeros_like(thetas[:, 0]))
    _, curvature = derivatives(tasks.support, phi)
    slope, _ = derivatives(tasks.query, phi)
    system = curvature + prox * torch.eye(thetas.shape[-1], dtype=thetas.dtype)
    return prox * torch.mean(torch.linalg.solve(system, slope), 0)
