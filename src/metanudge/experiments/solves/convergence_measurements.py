"""The study of convergence: residuals against gradients spent, and what solvers do to meta-gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import metanudge as mn
from metanudge.energy import InnerProblem
from metanudge.estimators import Estimator
from metanudge.execution import Vectorized
from metanudge.experiments.solves.alternatives import (
    LBFGS,
    Anderson,
    BarzilaiBorwein,
    FixedNesterov,
    GaussNewton,
    HeavyBall,
    SafeGradientDescent,
    gauss_newton_products,
)
from metanudge.experiments.solves.problems import Inner
from metanudge.oracle import StackedLosses, Tally
from metanudge.selection import select_parameters
from metanudge.solvers.loop import Solver
from metanudge.types import Params, Role

Make = Callable[[int, StackedLosses], Solver]
"""From a number of steps (and, for Gauss-Newton, the losses) to a solver."""

CANDIDATES: dict[str, Make] = {
    "nesterov": lambda steps, _: mn.Nesterov(steps),
    "nesterov_fixed": lambda steps, _: FixedNesterov(steps),
    "nesterov_no_restart": lambda steps, _: mn.Nesterov(steps, restart=False),
    "gradient_descent": lambda steps, _: SafeGradientDescent(steps),
    "heavy_ball": lambda steps, _: HeavyBall(steps),
    "barzilai_borwein_long": lambda steps, _: BarzilaiBorwein(steps),
    "barzilai_borwein_short": lambda steps, _: BarzilaiBorwein(steps, kind="short"),
    "anderson": lambda steps, _: Anderson(steps),
    "lbfgs": lambda steps, _: LBFGS(steps),
    "adam": lambda steps, _: mn.Adam(steps, lr=0.01),
    "gauss_newton": lambda steps, losses: GaussNewton(steps, gauss_newton_products(losses)),
}
"""The solvers of the study; none has a setting that depends on the problem."""


@contextmanager
def lent(inner: Inner, tally: Tally) -> Iterator[tuple[InnerProblem, StackedLosses]]:
    """The tasks of ``inner`` as one stack of lanes, counted by ``tally``."""
    losses = {Role.SUPPORT: inner.loss, Role.QUERY: inner.loss}
    execution = Vectorized(inner.model, losses)
    selection = select_parameters(inner.model, None)
    with torch.no_grad(), execution.lend(selection, [inner.tasks], inner.prox, tally) as found:
        problem = next(found.problems)
        assert isinstance(problem.losses, StackedLosses)
        yield problem, problem.losses


class Course(NamedTuple):
    """How a solve went.

    Attributes:
        residual: Relative inner residual, ``[marks, T]``; 1 where it is not finite.
        force: ||∇E|| in units of that at the start, ``[marks, T]``.
    """

    residual: Tensor
    force: Tensor


def course(inner: Inner, make: Make, marks: tuple[int, ...]) -> Course:
    """Solve, and measure where the solver is when it has spent ``marks`` gradients a task, at most.

    What is measured is not counted.
    """
    tally = Tally()
    with lent(inner, tally) as (problem, losses):
        solver = make(marks[-1], losses)
        energy, outside = problem.energy(), replace(problem, losses=replace(losses, tally=Tally())).energy()
        start = losses.spread(problem.theta)

        def points() -> Iterator[tuple[float, Params]]:
            plan = solver.plan(energy, start)
            state = solver.init(energy, start, plan)
            for index in range(solver.steps):
                state, _ = solver.step(energy, plan, state, index, None)
                yield tally.gradients / losses.number, solver.point(state)

        def measured(phi: Params) -> tuple[Tensor, Tensor]:
            pull, push = outside.forces(phi, 0)
            residual = outside.relative_residual(pull, push)[:, 0]
            return residual.nan_to_num(1.0), outside.norm(outside.gradient(phi, 0))[:, 0]

        way = points()
        nothing: tuple[float, Params] = (math.inf, {})  # all steps taken
        phi, coming = start, next(way)
        first = found = measured(phi)
        residuals, forces = [], []
        for mark in marks:
            moved = False
            while coming[0] <= mark:
                phi, coming, moved = coming[1], next(way, nothing), True
            found = measured(phi) if moved else found
            residuals.append(found[0])
            forces.append(found[1] / first[1])
    return Course(torch.stack(residuals).double(), torch.stack(forces).double())


def amplification(inner: Inner, make: Make, estimator: Estimator, steps: int) -> Tensor:
    r"""||meta-gradient|| / ||∇f(φ_K)||, ``[T]``; not above 1 for the exact one where the support loss is convex.

    For then ∇F = (I + H/λ)⁻¹ ∇f. What is far above 1 is the solver's doing.
    """
    norms = []
    for rule in (estimator, mn.FOMAML()):
        with lent(inner, Tally()) as (problem, losses):
            found = rule(problem, make(steps, losses))
            norms.append(problem.energy().norm(found.gradient)[:, 0])
    return (norms[0] / norms[1].clamp_min(1e-30)).double()
