"""What every estimator is, and the free solve that all but the unrolled ones begin with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import Balance, Energy, InnerProblem
from metanudge.errors import LossError, SettingsError
from metanudge.solvers.loop import Solver, solve
from metanudge.types import Estimate, Need, Params, Role, Schedule


class Estimator(Protocol):
    """How a meta-gradient is formed. Frozen settings; a pure function of the inner problem.

    Attributes:
        rule: The formula, for tables.
        cost: Gradients of one loss per task, K the inner steps, for tables.
        memory: What it keeps beyond the model, for tables.
        bias: Distance from the gradient of its own objective, for tables.
    """

    rule: ClassVar[str]
    cost: ClassVar[str]
    memory: ClassVar[str]
    bias: ClassVar[str]

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot do without."""
        ...

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Meta-gradients of the problems in the lanes."""
        ...


_TWICE = re.compile(r"differentia|derivative|double backward|use_reentrant|vmap|functorch|batching rule", re.IGNORECASE)


@contextmanager
def told_to_go_first_order(estimator: Estimator) -> Iterator[None]:
    """Where a model cannot be differentiated twice, or not for many tasks at once, tell what can learn it.

    Raises:
        LossError: In the place of what PyTorch, or the oracle, said.
    """
    try:
        yield
    except (LossError, RuntimeError) as error:
        said = error.__cause__ or error
        no_rule = isinstance(error, LossError) and "batching rule" in str(error)
        if Need.DOUBLE_BACKWARD not in estimator.needs or not (no_rule or _TWICE.search(str(said))):
            raise
        raise LossError(
            f"{type(estimator).__name__} differentiates the loss twice, for many tasks at once, which this model or "
            'loss does not allow. Use FOBMAML with execution="in_place": it takes first derivatives only and runs any '
            f"model. The reason: {said}"
        ) from error


def check_estimate(estimator: Estimator, estimate: object, problem: InnerProblem) -> None:
    """Raise a SettingsError where an estimator, of the user's own, has left a meta-parameter out."""
    name = type(estimator).__name__
    if not isinstance(estimate, Estimate):
        raise SettingsError(f"the estimator {name} must return a mn.Estimate, got {type(estimate).__name__}")
    wanted = {*problem.theta, *problem.losses.shared}
    if estimate.gradient.keys() != wanted:
        odd = ", ".join(sorted(map(str, estimate.gradient.keys() ^ wanted)))
        raise SettingsError(
            f"the estimator {name} must give a meta-gradient for the leaves of problem.theta and of "
            f"problem.losses.shared, these and no others, and differs in {odd}; for shared parameters "
            "return at least free.direct(problem), or declare metanudge.extend.Need.NO_SHARED_PARAMETERS"
        )


class FreeSolve(NamedTuple):
    """The solved free problem and both losses there.

    Attributes:
        phi: φ(0).
        schedule: For matched nudged solves.
        step: Index of the evaluations at φ(0), for the random state.
        aside: ξ, how far from φ(0) the query gradient is taken, if that was to be kept; empty for at φ(0) itself.
        query_gradient: ∇f(φ(0) + ξ) in adapted and shared parameters.
        slope_norm: Its norm in the adapted parameters, ``[*L]``.
        query_loss: ``[*L]``.
        support_loss: ``[*L]``.
        residual: Relative inner residual, ``[*L]``.
        way: ||φ(0) - θ||, ``[*L]``.
        start_loss: f̂(θ), ``[*L]``.
        diverged: Whether the solve ended above where it began, ``[*L]``.
    """

    phi: Params
    schedule: Schedule
    step: int
    aside: Params
    query_gradient: Params
    slope_norm: Tensor
    query_loss: Tensor
    support_loss: Tensor
    residual: Tensor
    way: Tensor
    start_loss: Tensor
    diverged: Tensor

    @property
    def slope(self) -> Params:
        """∇f(φ(0) + ξ) in the adapted parameters alone."""
        return {name: self.query_gradient[name] for name in self.phi}

    def length(self, problem: InnerProblem) -> Tensor:
        """What is far for φ(0), ``[*L]`` (``Energy.length``)."""
        return problem.energy().length(self.phi, self.slope, self.slope_norm, self.way, self.start_loss)

    def direct(self, problem: InnerProblem) -> Params:
        """∂f/∂w(φ(0) + ξ): what the shared parameters do to the query loss without moving φ."""
        return {name: self.query_gradient[name] for name in problem.losses.shared}

    def estimate(
        self,
        problem: InnerProblem,
        gradient: Params,
        nu: Tensor | None = None,
        error: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Estimate:
        """Complete an estimate."""
        norm, zero = problem.energy().norm, torch.zeros_like(self.residual)
        return Estimate(
            gradient,
            self.query_loss,
            self.support_loss,
            self.residual,
            zero if nu is None else nu,
            torch.full_like(self.residual, float("nan")) if error is None else error,
            norm({name: gradient[name] for name in problem.theta}),
            self.slope_norm,
            zero if noise is None else noise,
            self.diverged,
            self.start_loss.isfinite(),
            self.phi,
        )


def solve_free(problem: InnerProblem, solver: Solver, keeps_aside: bool = False) -> FreeSolve:
    """Solve the free problem and evaluate both losses at its solution: K + 2 gradients, or K + 3 (``judge``).

    It begins at θ, or at the problem's own start where the energy is lower there.
    """
    start = problem.initial
    if problem.start is not None:
        better = _value(problem, problem.start) < _value(problem, start)
        start = tree.select(better, problem.start, start)
    phi, schedule = solve(solver, problem.energy(), start)
    return judge(problem, phi, schedule, solver.steps, keeps_aside)


def _value(problem: InnerProblem, phi: Params) -> Tensor:
    """E(φ), ``[*L]``."""
    distance = tree.subtract(phi, problem.initial)
    return problem.losses.loss(Role.SUPPORT, phi) + problem.prox / 2 * problem.losses.inner(distance, distance)


def judge(problem: InnerProblem, phi: Params, schedule: Schedule, step: int, keeps_aside: bool = False) -> FreeSolve:
    r"""Evaluate both losses, and the residual, at the solution.

    With a ``radius`` c the query gradient is that of the worst point, to first order, of a ball around the solution,

    .. math::
        \nabla f(\phi + \xi), \qquad \xi = c \, \|\phi - \theta\| \, \nabla f(\phi) / \|\nabla f(\phi)\|

    so that all that is made of it descends f(φ(θ) + ξ), ξ held where it is: that keeps networks from sharpening, which
    the gradient of F does not feel (docs/theory.md). One gradient more. ξ itself is kept only on demand: it is a copy.

    Source: Foret et al., ICLR 2021 (arXiv:2010.01412); for MAML Abbas et al., ICML 2022 (arXiv:2206.03996).
    """
    losses, energy = problem.losses, problem.energy()
    support_loss, pull = losses.value_and_gradient(Role.SUPPORT, phi, step)
    balance = energy.balance(pull, phi)
    start_loss = losses.loss(Role.SUPPORT, problem.initial)
    diverged = _diverged(energy, pull, balance, start_loss, support_loss)
    del pull  # a large model has no room for it beside the query gradient
    query_loss, query_gradient = losses.value_and_all_gradients(Role.QUERY, phi, step)
    aside: Params = {}
    if problem.radius > 0:
        point = {name: query_gradient[name] for name in phi}
        length = problem.radius * balance.way / tree.or_one(energy.norm(point))
        del query_gradient
        point = tree.spend(lambda uphill: tree.over(length, uphill) * uphill, point)
        if keeps_aside:
            aside = dict(point)
        point = tree.spend(lambda way, solution: way + solution, point, phi)
        query_gradient = losses.value_and_all_gradients(Role.QUERY, point, step)[1]
        del point
    return FreeSolve(
        phi,
        schedule,
        step,
        aside,
        query_gradient,
        energy.norm({name: query_gradient[name] for name in phi}),
        query_loss,
        support_loss,
        balance.residual,
        balance.way,
        start_loss,
        diverged,
    )


def _diverged(energy: Energy, pull: Params, balance: Balance, start_loss: Tensor, support_loss: Tensor) -> Tensor:
    """Whether E(φ) is far above E(θ): by more than ten times |f̂(θ)|.

    And by more than round-off, or a draw of dropout, would do where f̂(θ) is nearly zero: by more than what it costs to
    move a tenth of the norm of θ in the parameters that the support loss touches; or where that costs nothing, λ being
    0, after a way of more than half of it.
    """
    rise = support_loss - start_loss + energy.prox / 2 * balance.way**2
    more = rise - 10 * start_loss.abs()
    if not (more > 0).any():  # nearly always; the norm takes several passes over the parameters
        return more > 0
    size = energy.touched(energy.theta, pull, balance.pull)
    far = more > energy.prox / 2 * (size / 10) ** 2
    return far if energy.prox > 0 else far & (balance.way > size / 2)
