"""Linear regressions with a loss of one residual: exact inner solutions, meta-gradients and meta-Hessians."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from metanudge.diagnostics import ExactMetaObjective
from metanudge.errors import NonFiniteError
from metanudge.metrics import squared_error
from metanudge.types import Batch, Tasks


class Penalty(NamedTuple):
    """A loss of one residual r: its value, three derivatives, and h'(r) / r >= h''(r), a majorant's curvature."""

    value: Tensor
    slope: Tensor
    curvature: Tensor
    change: Tensor
    majorant: Tensor


def pseudo_huber(r: Tensor) -> Penalty:
    """Evaluate sqrt(1 + r^2) - 1: a square near 0, an absolute value far away."""
    root = (1 + r.square()).sqrt()
    s = 1 / root
    cube = s * s * s
    return Penalty(root - 1, r * s, cube, -3 * r * cube * s * s, s)


def square(r: Tensor) -> Penalty:
    """Evaluate r^2 / 2, whose third derivative is 0."""
    return Penalty(r.square() / 2, r, torch.ones_like(r), torch.zeros_like(r), torch.ones_like(r))


LARGEST_CHANGE: dict[Callable[[Tensor], Penalty], float] = {
    pseudo_huber: 48 / (25 * math.sqrt(5)),
    square: 0.0,
}  # max |h'''|


@dataclass(frozen=True)
class LinearFamily:
    """What the tasks are drawn from: inputs and solutions of unit variance."""

    tasks: int = 8  # in the meta-objective: enough that their gradients differ
    points: int = 20  # support points, as many query points: four a parameter, so that f̂ has curvature everywhere
    dimension: int = 5  # parameters of a task: dense Hessians stay cheap
    noise: float = 0.1  # of the targets: small against 1, the residual at which the pseudo-Huber loss bends


class LinearTasks:
    """T linear regressions at P meta-parameters at once: θ is ``[P, d]``, φ ``[T, P, d]``; closed forms, given φ."""

    def __init__(self, tasks: Tasks, prox: float, penalty: Callable[[Tensor], Penalty] = pseudo_huber) -> None:
        self.tasks, self.prox, self._penalty = tasks, prox, penalty
        (self._x, self._y), (self._xq, self._yq) = ((part.inputs, part.targets.mT) for part in tasks)
        self.number, self._points, dimension = self._x.shape
        self._eye = torch.eye(dimension, dtype=self._x.dtype)
        self._outer = (self._x[..., None] * self._x[..., None, :]).flatten(2) / self._points
        self.query_hessian = 2 * self._xq.mT @ self._xq / self._points  # [T, d, d]
        moment = torch.linalg.matrix_norm(self._outer.sum(1).unflatten(-1, self._eye.shape), 2)
        self.rho = LARGEST_CHANGE[penalty] * self._x.norm(dim=-1).amax(1) * moment  # [T]

    @classmethod
    def draw(
        cls,
        family: LinearFamily,
        prox: float,
        generator: Generator,
        penalty: Callable[[Tensor], Penalty] = pseudo_huber,
    ) -> LinearTasks:
        """Draw inputs and solutions of unit variance, targets with noise."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def batch() -> Batch:
            inputs = normal(family.tasks, family.points, family.dimension)
            return Batch(inputs, inputs @ solution + family.noise * normal(family.tasks, family.points, 1))

        solution = normal(family.tasks, family.dimension, 1)
        return cls(Tasks(batch(), batch()), prox, penalty)

    def _support(self, phi: Tensor) -> Penalty:
        return self._penalty(phi @ self._x.mT - self._y)

    def _mean_outer(self, weights: Tensor) -> Tensor:
        """mean_j weights_j x_j x_j^T, ``[T, P, d, d]``."""
        found: Tensor = (weights @ self._outer).unflatten(-1, self._eye.shape)
        return found

    def solve(self, theta: Tensor, start: Tensor | None = None, tolerance: float = 1e-13) -> Tensor:
        """φ_i(θ): Newton steps; where one does not descend, a step on the majorant, which always does."""

        def energy(value: Tensor, phi: Tensor) -> Tensor:
            return value.mean(-1) + self.prox / 2 * (phi - theta).square().sum(-1)

        def step(weights: Tensor) -> Tensor:
            move: Tensor = torch.linalg.solve(self._mean_outer(weights) + self.prox * self._eye, -slope)
            return move

        phi = theta.expand(len(self._x), -1, -1) if start is None else start
        support = self._support(phi)
        for _ in range(500):
            slope = support.slope @ self._x / self._points + self.prox * (phi - theta)
            move, before = step(support.curvature), energy(support.value, phi)
            enough = before + 1e-4 * (slope * move).sum(-1) + 1e-14 * (1 + before)  # differences within round-off pass
            trial = self._support(phi + move)
            short = energy(trial.value, phi + move) > enough
            if bool(short.any()):
                move = torch.where(short[..., None], step(support.majorant), move)
                trial = self._support(phi + move)
            phi, support = phi + move, trial
            if bool((move.norm(dim=-1) <= tolerance * (1 + phi.norm(dim=-1))).all()):
                return phi
        raise NonFiniteError("the inner problems were not solved in 500 steps")

    def systems(self, phi: Tensor) -> Tensor:
        """A_i, ``[T, P, d, d]``."""
        return self._mean_outer(self._support(phi).curvature) + self.prox * self._eye

    def gradients(self, phi: Tensor) -> Tensor:
        """∇F_i, ``[T, P, d]``."""
        query = 2 * (phi @ self._xq.mT - self._yq) @ self._xq / self._points
        found: Tensor = self.prox * torch.linalg.solve(self.systems(phi), query)
        return found

    def hessians(self, phi: Tensor) -> Tensor:
        """∇²F_i, ``[T, P, d, d]``."""
        third = self._mean_outer(self._support(phi).change * (self.gradients(phi) @ self._x.mT))
        inverse = torch.linalg.inv(self.systems(phi))
        found: Tensor = inverse @ (self.prox**2 * self.query_hessian[:, None] - self.prox * third) @ inverse
        return found

    def differentiated(self) -> ExactMetaObjective:
        """Return the same problem for automatic differentiation, at one θ at a time."""

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return self._penalty(model(batch.inputs) - batch.targets).value.mean()

        model = nn.Linear(len(self._eye), 1, bias=False, dtype=self._x.dtype)
        return ExactMetaObjective(model, loss, self.tasks, self.prox, query_loss=squared_error)
