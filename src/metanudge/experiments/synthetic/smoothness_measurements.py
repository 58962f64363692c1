"""What the study of smoothness measures (see smoothness.py): Hessian norms along descents, their bounds and fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from metanudge.experiments.synthetic.linear_tasks import LinearFamily, LinearTasks, square


@dataclass(frozen=True)
class SmoothnessSettings:
    """Settings of the study of smoothness."""

    prox: tuple[float, ...] = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # λ, half a decade apart: the bound on L1 grows 300-fold
    beyond_prox: float = 0.003  # for the text: every start is within reach of the inner solve, no gradient is large
    control_prox: float = 0.1  # of the control with a quadratic support loss, in the middle of the range
    draws: int = 6  # of the tasks: the fit pools them, their spread tells what one draw may give
    family: LinearFamily = field(default_factory=LinearFamily)
    starts: int = 24  # trajectories of a draw
    nearest: float = 2.0  # distance of the nearest start: about the spread of the tasks' solutions
    farthest: float = 80.0  # distance of the farthest start: residuals far beyond the bend of the loss
    steps: int = 12  # normalised steps of a trajectory
    step_share: float = 0.1  # length of a step over the distance of the start: ten steps may lead to the solutions
    checked: int = 8  # points of each λ where the closed form is held against automatic differentiation
    seed: int = 0  # of tasks and directions

    @classmethod
    def quick(cls) -> SmoothnessSettings:
        """Return a form that takes a few seconds: fewer draws, starts and λ."""
        return cls(prox=(1.0, 0.3, 0.1, 0.03, 0.01), draws=2, starts=12, checked=2)


class Points(NamedTuple):
    """Points of trajectories, flattened: θ ``[N, d]``, ||∇F||, ||Hess F||, the midpoint estimate, and their checks."""

    theta: Tensor
    gradient: Tensor
    exact: Tensor
    midpoint: Tensor
    bound: Tensor  # largest share of its bound that Hess F or a task's Hess F_i has at the point
    local_bound: Tensor  # the same with ||A_i^-1|| for 1 / (λ + μ)


def follow(problem: LinearTasks, settings: SmoothnessSettings, generator: Generator) -> Points:
    """Walk down from starts in random directions with normalised steps, and measure at every point."""
    shape = (settings.starts, settings.family.dimension)
    directions = nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64))
    near, far = math.log10(settings.nearest), math.log10(settings.farthest)
    distance = torch.logspace(near, far, settings.starts, dtype=torch.float64)[:, None]
    theta, found = distance * directions, []
    for _ in range(settings.steps):
        phi = problem.solve(theta)
        gradient = problem.gradients(phi).mean(0)
        move = -settings.step_share * distance * nn.functional.normalize(gradient)
        change = problem.gradients(problem.solve(theta + move / 2)).mean(0) - gradient
        midpoint = change.norm(dim=-1) / (move / 2).norm(dim=-1)
        exact = torch.linalg.matrix_norm(problem.hessians(phi).mean(0), 2)
        found.append(Points(theta, gradient.norm(dim=-1), exact, midpoint, *shares_of_bounds(problem, phi)))
        theta = theta + move
    return Points(*map(torch.cat, zip(*found, strict=True)))


def shares_of_bounds(problem: LinearTasks, phi: Tensor) -> tuple[Tensor, Tensor]:
    """||Hess|| over its bound, the largest among the tasks and their mean, ``[P]``; second with the local bound."""
    hessians, gradients = problem.hessians(phi), problem.gradients(phi).norm(dim=-1)
    inner = problem.prox**2 * torch.linalg.matrix_norm(problem.query_hessian, 2)[:, None]
    inner = inner + problem.prox * problem.rho[:, None] * gradients

    def shares(bounds: Tensor) -> Tensor:
        mean = torch.linalg.matrix_norm(hessians.mean(0), 2) / bounds.mean(0)
        return torch.maximum((torch.linalg.matrix_norm(hessians, 2) / bounds).amax(0), mean)

    local = torch.linalg.matrix_norm(torch.linalg.inv(problem.systems(phi)), 2)
    return shares(inner / problem.prox**2), shares(inner * local**2)


def fit(gradient: Tensor, smoothness: Tensor) -> dict[str, float]:
    """Least squares for smoothness = L0 + L1 ||∇F||."""
    columns = torch.stack([torch.ones_like(gradient), gradient], 1)
    line = torch.linalg.lstsq(columns, smoothness[:, None]).solution[:, 0]
    unexplained = (smoothness - columns @ line).square().sum() / (smoothness - smoothness.mean()).square().sum()
    return {"L0": float(line[0]), "L1": float(line[1]), "r2": 1 - float(unexplained)}


def measure(settings: SmoothnessSettings, prox: float) -> tuple[Points, dict[str, Any]]:
    """All draws at one λ: the points, and the metrics."""
    parts, slopes, limits, error = [], [], [], 0.0
    for draw in range(settings.draws):
        generator = Generator().manual_seed(1000 * settings.seed + draw)  # the same tasks and starts for every λ
        problem = LinearTasks.draw(settings.family, prox, generator)
        parts.append(follow(problem, settings, generator))
        slopes.append(fit(parts[-1].gradient, parts[-1].exact)["L1"])
        limits.append(float(problem.rho.max()) / prox)
        if draw == 0:
            chosen, norms = differentiated(problem, parts[0], settings.checked)
            error = float(((parts[0].exact[chosen] - norms).abs() / norms).max())
    points = Points(*map(torch.cat, zip(*parts, strict=True)))
    return points, fit(points.gradient, points.exact) | {
        "prox": prox,
        "bound_violations": int((points.bound > 1 + 1e-9).sum()),
        "local_bound_violations": int((points.local_bound > 1 + 1e-9).sum()),
        "largest_share_of_bound": float(points.bound.max()),
        "largest_share_of_local_bound": float(points.local_bound.max()),
        "points": len(points.gradient),
        "midpoint": fit(points.gradient, points.midpoint),
        "L1_of_draws": slopes,
        "L1_bound": max(limits),
        "norm_ratio": float(points.exact.max() / points.exact.min()),
        "largest_gradient": float(points.gradient.max()),
        "closed_form_error": error,
    }


def differentiated(problem: LinearTasks, points: Points, number: int) -> tuple[Tensor, Tensor]:
    """Some of the points, evenly taken: their indices, and ||Hess F|| there by automatic differentiation."""
    chosen = torch.linspace(0, len(points.theta) - 1, number).long()
    objective = problem.differentiated()
    return chosen, torch.stack([torch.linalg.matrix_norm(objective.hessian(points.theta[k]), 2) for k in chosen])


def control(settings: SmoothnessSettings) -> dict[str, float]:
    """Fit a quadratic support loss, with automatic differentiation, as the closed form could only answer 0."""
    generator = Generator().manual_seed(1000 * settings.seed)
    problem = LinearTasks.draw(settings.family, settings.control_prox, generator, penalty=square)
    points = follow(problem, settings, generator)
    chosen, norms = differentiated(problem, points, 6 * settings.checked)
    return {"L1": fit(points.gradient[chosen], norms)["L1"], "L1_midpoint": fit(points.gradient, points.midpoint)["L1"]}
