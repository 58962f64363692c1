r"""Heterogeneous linear regression: the inner problem has a closed form, and so has the meta-gradient.

.. math::
    y = \langle w + v_i, x \rangle + \text{noise}, \qquad
    \phi_i(\theta) = (H_i + \lambda)^{-1} (\tfrac{2}{n} X_i^T y_i + \lambda \theta), \quad H_i = \tfrac{2}{n} X_i^T X_i

with inputs x and weights as in the logistic family: every task has its own rotation, spectrum and scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metanudge.errors import SettingsError
from metanudge.settings import check_positive, check_steps
from metanudge.tasks.heterogeneous import Family, draw_scores
from metanudge.types import Batch, Tasks


def linear(
    number: int,
    *,
    features: int = 20,
    shots: int = 40,
    queries: int = 40,
    common: float = 1.0,
    difference: float = 1.0,
    scales: float = 2.0,
    anisotropy: float = 2.0,
    noise: float = 0.1,
    seed: int = 0,
    first: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tasks:
    """Draw a stack of linear regressions; task i is a pure function of (seed, i).

    Args:
        number: Tasks T, with indices first .. first + T - 1.
        features: Dimension d of the inputs ``[T, n, d]``; targets are ``[T, n, 1]``.
        shots: Support examples of a task.
        queries: Query examples of a task.
        common: Norm of the weights w that all tasks share.
        difference: Root mean square norm of a task's own weights v.
        scales: Overall scales of the tasks lie in [1 / scales, scales], uniform in the logarithm.
        anisotropy: Within a task, scales of its principal directions lie in [1 / anisotropy, anisotropy], likewise.
        noise: Standard deviation of the noise, >= 0.
        seed: Of the family.
        first: Index of the first task.
        dtype: Of inputs and targets.

    Raises:
        SettingsError: A value out of its range.

    Example:
        >>> import torch, metanudge as mn
        >>> tasks = mn.tasks.linear(3, features=5)
        >>> phi = mn.tasks.linear_solutions(tasks.support, torch.zeros(5).double(), prox=1.0)
        >>> phi.shape
        torch.Size([3, 5])
    """
    for name, size in (("number", number), ("features", features), ("shots", shots), ("queries", queries)):
        check_steps(size, name)
    check_positive(scales=scales, anisotropy=anisotropy)
    if not 0 <= noise < math.inf:
        raise SettingsError(f"noise is a standard deviation of at least 0, got {noise!r}")
    family = Family(features, shots + queries, common, difference, scales, anisotropy, seed)

    def draw(index: int) -> tuple[Tensor, Tensor]:
        inputs, scores, generator = draw_scores(family, index)
        disturbance = torch.randn(len(scores), generator=generator, dtype=torch.float64, device="cpu")
        return inputs, (scores + noise * disturbance).unsqueeze(-1)

    drawn = [draw(index) for index in range(first, first + number)]
    x, y = (torch.stack(same).to(dtype) for same in zip(*drawn, strict=True))
    return Tasks(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))


def linear_solutions(support: Batch, theta: Tensor, prox: float) -> Tensor:
    """φ_i(θ) of ``mn.metrics.squared_error`` on a linear model without bias, in closed form: ``[T, d]``.

    Args:
        support: Inputs ``[T, n, d]`` and targets ``[T, n, 1]``.
        theta: The initialisation ``[d]``.
        prox: λ > 0.
    """
    x, y = support
    system = _system(x, prox)
    solved: Tensor = torch.linalg.solve(system, (2 / x.shape[1] * x.mT @ y).squeeze(-1) + prox * theta)
    return solved


def linear_meta_gradient(tasks: Tasks, theta: Tensor, prox: float) -> Tensor:
    """∇F(θ) = mean_i λ (H_i + λ)⁻¹ ∇f_i(φ_i) of the same problem, in closed form: ``[d]``.

    Args:
        tasks: A stack.
        theta: The initialisation ``[d]``.
        prox: λ > 0.
    """
    phi = linear_solutions(tasks.support, theta, prox)
    (x, _), (x_query, y_query) = tasks
    system = _system(x, prox)
    slope = 2 / x_query.shape[1] * x_query.mT @ (x_query @ phi.unsqueeze(-1) - y_query)
    found: Tensor = prox * torch.linalg.solve(system, slope).squeeze(-1).mean(0)
    return found


def _system(x: Tensor, prox: float) -> Tensor:
    """H + λ of every task, ``[T, d, d]``."""
    return 2 / x.shape[1] * x.mT @ x + prox * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
