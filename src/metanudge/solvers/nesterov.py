"""Nesterov's accelerated gradient, with step size and momentum from the problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from metanudge import tree
from metanudge.curvature import lipschitz_constant
from metanudge.energy import Energy
from metanudge.errors import SettingsError
from metanudge.settings import check_fraction, check_positive, check_steps
from metanudge.types import Need, Params


class Plan(NamedTuple):
    """Step size and momentum, numbers or ``[*L]``; momentum None for the schedule k / (k + 3)."""

    lr: Tensor | float
    momentum: Tensor | float | None


class State(NamedTuple):
    """Iterate x, extrapolated point y, and the lanes still at work, ``[*L]`` (None before the first step)."""

    x: Params
    y: Params
    active: Tensor | None


@dataclass(frozen=True)
class Nesterov:
    r"""Accelerated gradient with adaptive restart; needs no tuning by default.

    .. math::
        x_{k+1} = y_k - a \nabla E(y_k), \qquad y_{k+1} = x_{k+1} + \beta (x_{k+1} - x_k), \qquad
        \beta = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}, \quad \kappa = \frac{1}{a \lambda}

    With ``lr="auto"``, a = 1 / (1.5 L + λ), L estimated per task at the start of the solve (power iteration on
    differences of two gradients). Without a proximal term β = k / (k + 3). Restart: where <∇E(y_k), x_{k+1} - x_k> > 0
    the momentum is dropped. Nudged solves replay step sizes, restarts and stops of the free solve.

    Cost: one gradient of the energy a step, and ``power_iterations + 1`` support gradients for L.
    Memory: phi and three copies.

    Args:
        steps: Number of steps K >= 1 (at most, with ``tol``).
        tol: Stop a task at this relative residual (``MetaStep.residual``, measured at y);
            None to take all steps. Needs prox > 0.
        lr: Step size a > 0, or "auto".
        momentum: β in [0, 1), or "auto" from the condition number.
        restart: Whether to drop the momentum where it points uphill.
        power_iterations: Iterations of the estimate of L, >= 1.

    Raises:
        SettingsError: A value out of its range.

    Source: Nesterov, Introductory Lectures (2004), 2.2; restart: O'Donoghue & Candès, Found. Comput. Math. 15 (2015).

    Example:
        >>> import metanudge as mn
        >>> mn.Nesterov(steps=16).lr
        'auto'
    """

    differentiable: ClassVar[bool] = True

    steps: int
    tol: float | None = None
    lr: float | Literal["auto"] = "auto"
    momentum: float | Literal["auto"] = "auto"
    restart: bool = True
    power_iterations: int = 5

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.tol is not None:
            check_positive(tol=self.tol)
        for name, value, check in (("lr", self.lr, check_positive), ("momentum", self.momentum, check_fraction)):
            if isinstance(value, str):
                if value != "auto":
                    raise SettingsError(f'{name} must be a number or "auto", got {value!r}')
            else:
                check(**{name: value})
        if self.power_iterations < 1:
            raise SettingsError(f"power_iterations must be at least 1, got {self.power_iterations!r}")

    @property
    def needs(self) -> frozenset[Need]:
        """The proximal problem where ``tol`` is to measure the balance of its forces."""
        return frozenset() if self.tol is None else frozenset({Need.PROXIMAL_TERM})

    def plan(self, energy: Energy, start: Params) -> Plan:
        """Measure the curvature at ``start``; numbers, not part of any graph."""
        lr: Tensor | float
        if isinstance(self.lr, str):
            with torch.no_grad():
                constant = lipschitz_constant(energy, tree.detach(start), self.power_iterations, step=0)
                # a flat loss without proximal term has no scale of its own: take unit steps
                inverse = 1.5 * constant + energy.prox
                lr = torch.where(inverse > 0, 1 / inverse.clamp_min(1e-30), torch.ones_like(inverse))
        else:
            lr = self.lr
        if not isinstance(self.momentum, str):
            return Plan(lr, self.momentum)
        if energy.prox == 0:
            return Plan(lr, None)
        root = (lr * energy.prox) ** 0.5
        beta = (1 - root) / (1 + root)
        return Plan(lr, beta.clamp_min(0.0) if isinstance(beta, Tensor) else max(beta, 0.0))

    def init(self, energy: Energy, start: Params, plan: Plan) -> State:
        """Begin at rest."""
        return State(start, start, None)

    def step(
        self, energy: Energy, plan: Plan, state: State, index: int, decision: Tensor | None
    ) -> tuple[State, Tensor]:
        """One accelerated step; the decision is ``[2, *L]``: which lanes move, which of them restart."""
        pull, push = energy.forces(state.y, index)
        gradient = tree.add(pull, push)
        x = tree.axpy(-plan.lr, gradient, state.y)
        move = tree.subtract(x, state.x)
        if decision is None:
            decision = self._decide(energy, state, pull, push, move)
        active, restart = decision
        momentum = index / (index + 3) if plan.momentum is None else plan.momentum
        keep = (~restart).to(next(iter(x.values())).dtype)
        y = tree.axpy(momentum * keep, move, x)
        if self.tol is not None:
            x, y = tree.select(active, x, state.x), tree.select(active, y, state.y)
        return State(x, y, active), decision

    def _decide(self, energy: Energy, state: State, pull: Params, push: Params, move: Params) -> Tensor:
        with torch.no_grad():
            uphill = energy.losses.inner(tree.add(pull, push), move) > 0
            active = torch.ones_like(uphill) if state.active is None else state.active
            if self.tol is not None:
                active = active & (energy.relative_residual(pull, push) > self.tol)
            return torch.stack([active, uphill if self.restart else torch.zeros_like(uphill)])

    def point(self, state: State) -> Params:
        """The iterate x."""
        return state.x

    def finished(self, state: State) -> bool:
        """With a tolerance: whether every lane has reached it."""
        return self.tol is not None and state.active is not None and not bool(state.active.any())
