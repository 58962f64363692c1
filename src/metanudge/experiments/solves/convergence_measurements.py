"""The study of convergence: residuals against gradients spent, and what solvers do to meta-gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import metanudge as mn
from metanudge import tree
from metanudge.energy import InnerProblem
from metanudge.estimators import Estimator
from metanudge.estimators.base import FreeSolve, solve_free
from metanudge.estimators.imaml import conjugate_gradients
from metanudge.execution import Use, Vectorized
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
from metanudge.oracle import BatchNorm, StackedLosses, Tally
from metanudge.selection import select_parameters
from metanudge.solvers.loop import Solver
from metanudge.types import Need, Params, Role

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
    "gauss_newton_4": lambda steps, losses: GaussNewton(steps, gauss_newton_products(losses), 4),
    "gauss_newton_16": lambda steps, losses: GaussNewton(steps, gauss_newton_products(losses), 16),
}
"""The solvers of the study; none has a setting that depends on the problem."""


def candidates(inner: Inner) -> dict[str, Make]:
    """Those that can solve ``inner``: Gauss-Newton only squared errors."""
    return {name: make for name, make in CANDIDATES.items() if inner.least_squares or "gauss" not in name}


@contextmanager
def lent(inner: Inner, tally: Tally) -> Iterator[tuple[InnerProblem, StackedLosses]]:
    """The tasks of ``inner`` as one stack of lanes, counted by ``tally``."""
    losses = {Role.SUPPORT: inner.loss, Role.QUERY: inner.loss}
    execution = Vectorized(inner.model, losses, norm=BatchNorm(None, inner.model))
    selection = select_parameters(inner.model, None)
    with torch.no_grad(), execution.lend(Use(selection, [inner.tasks], inner.prox, tally)) as found:
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
                yield tally.gradients / losses.forward.number, solver.point(state)

        def measured(phi: Params) -> tuple[Tensor, Tensor]:
            residual = outside.balance(outside.pull(phi, 0), phi).residual[:, 0]
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


def implicit_gradient(losses: StackedLosses, free: FreeSolve, prox: float, steps: int = 40) -> tuple[Params, Tensor]:
    """v, (I + H/λ) v = ∇f where the free solve ended, by conjugate gradients on exact products; where it is one.

    Where H + λ is not positive definite, or the products are not finite, there is no such v: ``[*L]``, False.
    """
    product = losses.hessian_product(free.phi, free.step)

    def system(vector: Params) -> Params:
        return tree.axpy(1 / prox, product(vector), vector)

    found = conjugate_gradients(losses, system, free.slope, steps, tol=1e-6)
    left = tree.subtract(system(found), free.slope)
    return found, losses.inner(left, left) <= 1e-4 * losses.inner(free.slope, free.slope)


def errors(inner: Inner, make: Make, estimators: Mapping[str, Estimator], steps: int) -> dict[str, Tensor]:
    """Relative errors ||g - v|| / ||v|| of meta-gradients of single tasks, by estimator; v the implicit gradient.

    v is taken where the solver's ``steps`` steps end, so that it is the solver's own answer that is differentiated.
    Tasks without a v are left out; infinite where a meta-gradient is not finite.
    """
    with lent(inner, Tally()) as (problem, losses):
        solver, norm = make(steps, losses), problem.energy().norm
        exact, there = implicit_gradient(losses, solve_free(problem, solver), problem.prox)
        found = {}
        for name, estimator in estimators.items():
            if Need.DIFFERENTIABLE_SOLVER in estimator.needs and not solver.differentiable:
                continue
            off = norm(tree.subtract(estimator(problem, solver).gradient, exact)) / norm(exact)
            found[name] = off[there].double().nan_to_num(math.inf, math.inf)
    return found
