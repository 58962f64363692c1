"""Nesterov's accelerated gradient, with step size and momentum from the problem."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from metanudge import tree
from metanudge.curvature import Curvature, lipschitz_constant
from metanudge.energy import Energy
from metanudge.errors import SettingsError
from metanudge.settings import check_flag, check_fraction, check_positive, check_steps
from metanudge.types import Need, Params, PyTree, Schedule

SHORTEST = float(torch.finfo(torch.float32).eps ** 0.5)
"""Length, relative to what is far, below which a secant is not believed: it is round-off in float32, and across a kink
of the loss it is the steeper the shorter it is."""


class Decision(NamedTuple):
    """What a step of the free solve decided, ``[*L]`` each.

    Attributes:
        active: Which lanes move.
        restart: Which drop their momentum.
        lr: Step size.
        momentum: β, in lanes that do not restart.
    """

    active: Tensor
    restart: Tensor
    lr: Tensor | float
    momentum: Tensor | float


@dataclass(frozen=True)
class Secant:
    """What the next step size rests on; a dataclass, so that trees of tensors, and autograd, do not look inside.

    Attributes:
        constant: L so far, ``[*L]``.
        y: The last point.
        pull: ∇f̂ there.
    """

    constant: Tensor
    y: Params
    pull: Params


class State(NamedTuple):
    """Iterate x, extrapolated point y, the lanes still at work (None for all), and the last secant."""

    x: Params
    y: Params
    active: Tensor | None
    secant: Secant | None


@dataclass(frozen=True)
class Nesterov:
    r"""Accelerated gradient with adaptive restart; needs no tuning by default.

    .. math::
        x_{k+1} = y_k - a \nabla E(y_k), \qquad y_{k+1} = x_{k+1} + \beta (x_{k+1} - x_k), \qquad
        \beta = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}, \quad \kappa = \frac{1}{a \lambda}

    With ``lr="auto"``, a = 1 / (1.2 L + λ) for every task and step. L is estimated at the start of the solve, by power
    iteration on differences of two gradients, and raised to ||∇f̂(y_k) - ∇f̂(y_{k-1})|| / ||y_k - y_{k-1}|| wherever the
    way shows more curvature, which costs no gradient. Without a proximal term β = k / (k + 3). Restart: where
    <∇E(y_k), x_{k+1} - x_k> > 0 the momentum is dropped. Nudged solves from the start replay step sizes, restarts and
    stops of the free solve; those from its solution its restarts, with its last step size, and take all ``steps``.

    Of a support set in minibatches L is twice what the first one shows, and stays: between the gradients of two
    minibatches a secant is noise, and would raise L without end. The automatic β is 0 there, as momentum adds noise up.

    Cost: one gradient of the energy a step, and ``power_iterations + 1`` support gradients for L.
    Memory: phi and six copies.

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
    _: KW_ONLY  # the second one of other solvers is lr
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
        check_steps(self.power_iterations, "power_iterations")
        check_flag(restart=self.restart)

    @property
    def needs(self) -> frozenset[Need]:
        """The proximal problem where ``tol`` is to measure the balance of its forces."""
        return frozenset() if self.tol is None else frozenset({Need.PROXIMAL_TERM})

    def plan(self, energy: Energy, start: Params) -> Curvature | None:
        """Measure the curvature at ``start``; numbers, not part of any graph."""
        if not isinstance(self.lr, str):
            return None
        with torch.no_grad():
            found = lipschitz_constant(energy, tree.detach(start), self.power_iterations, step=0)
        return found._replace(constant=2 * found.constant) if energy.losses.sampled else found

    def init(self, energy: Energy, start: Params, plan: Curvature | None) -> State:
        """Begin at rest."""
        if plan is None or energy.losses.sampled:
            return State(start, start, None, None)
        # a secant of no length, which tells nothing: the first step has the form of the others
        return State(start, start, None, Secant(plan.constant, start, start))

    def step(
        self, energy: Energy, plan: Curvature | None, state: State, index: int, decision: Decision | None
    ) -> tuple[State, Decision]:
        """One accelerated step."""
        if decision is not None:
            x, y = self._fused(energy, partial(self._replay, index), state.x, state.y, decision)
            return State(x, y, decision.active, None), decision
        last = None if state.secant is None else (state.secant.constant, state.secant.y, state.secant.pull)
        decide = partial(self._decide, index)
        x, y, told, decision = self._fused(energy, decide, plan, state.x, state.y, state.active, last)
        secant = None if told is None else Secant(told[0], state.y, told[1])
        return State(x, y, decision.active if self.tol is not None else None, secant), decision

    def _fused(self, energy: Energy, function: partial[Any], *given: PyTree) -> Any:
        # a program would freeze the step's number, on which β depends without a proximal term; a subclass may read more
        if (energy.prox == 0 and isinstance(self.momentum, str)) or type(self) is not Nesterov:
            return function(energy, *given)
        read = (self.tol, self.lr, self.momentum, self.restart)
        return energy.fused((Nesterov, function.func.__name__, *read), function, *given)

    def _replay(self, index: int, energy: Energy, x: Params, y: Params, decision: Decision) -> tuple[Params, Params]:
        """The next x and y."""
        ahead = tree.axpy(-decision.lr, energy.gradient(y, index), y)
        return self._move(x, y, ahead, decision)

    def _decide(
        self,
        index: int,
        energy: Energy,
        plan: Curvature | None,
        x: Params,
        y: Params,
        active: Tensor | None,
        last: tuple[Tensor, Params, Params] | None,
    ) -> tuple[Params, Params, tuple[Tensor, Params] | None, Decision]:
        """The next x and y, L and ∇f̂(y), and what was decided."""
        pull = energy.pull(y, index)
        gradient = energy.total(pull, y)
        constant = None if plan is None else plan.constant
        if plan is not None and last is not None:
            constant = _raised(energy, plan, Secant(*last), y, pull)
        lr = self._lr(energy, constant)
        ahead = tree.axpy(-lr, gradient, y)
        with torch.no_grad():
            parts = energy.losses.operands(gradient, ahead, x)  # part by part: no copy of the difference is made
            uphill = energy.losses.added([energy.losses.share(one, to - before) for one, to, before in parts]) > 0
            active = torch.ones_like(uphill) if active is None else active
            if self.tol is not None:
                active = active & (energy.balance(pull, y).residual > self.tol)
            decision = self._decision(active, uphill & active, lr, self._momentum(energy, lr, index))
        del gradient
        told = None if constant is None or last is None else (constant, tree.detach(pull))
        return *self._move(x, y, ahead, decision), told, decision

    def _decision(self, active: Tensor, uphill: Tensor, lr: Tensor | float, momentum: Tensor | float) -> Decision:
        restart = uphill if self.restart else torch.zeros_like(uphill)
        return Decision(active, restart, lr, momentum)

    def _move(self, x: Params, y: Params, ahead: Params, decision: Decision) -> tuple[Params, Params]:
        """To ``ahead``, and beyond it by the momentum; lanes that have stopped stay."""
        momentum = decision.momentum * (~decision.restart).to(next(iter(x.values())).dtype)
        beyond = tree.compute(lambda a, b: a.addcmul(tree.over(momentum, a), a - b), ahead, x)
        if self.tol is not None:
            return tree.select(decision.active, ahead, x), tree.select(decision.active, beyond, y)
        return ahead, beyond

    def _lr(self, energy: Energy, constant: Tensor | None) -> Tensor | float:
        if constant is None:
            assert not isinstance(self.lr, str)
            return self.lr
        inverse = 1.2 * constant + energy.prox
        # a flat loss without proximal term has no scale of its own: take unit steps
        return torch.where(inverse > 0, 1 / tree.or_one(inverse), torch.ones_like(inverse))

    def _momentum(self, energy: Energy, lr: Tensor | float, index: int) -> Tensor | float:
        if not isinstance(self.momentum, str):
            return self.momentum
        if energy.losses.sampled:
            return torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
        if energy.prox == 0:
            return index / (index + 3)
        root = (lr * energy.prox) ** 0.5
        beta = (1 - root) / (1 + root)
        return beta.clamp_min(0.0) if isinstance(beta, Tensor) else max(beta, 0.0)

    def settle(self, schedule: Schedule, steps: int) -> Schedule:
        """At the solution: the step size that suits the curvature there, and no early stop."""
        last = schedule.decisions[-1]
        always, never = torch.ones_like(last.active), torch.zeros_like(last.restart)

        def made(restart: Tensor) -> Decision:
            return self._decision(always, restart, last.lr, last.momentum)

        decisions = [made(one.restart) for one in schedule.decisions[:steps]]
        decisions += [made(never)] * (steps - len(decisions))
        return schedule._replace(decisions=decisions)

    def point(self, state: State) -> Params:
        """The iterate x."""
        return state.x

    def finished(self, state: State) -> bool:
        """With a tolerance: whether every lane has reached it."""
        return self.tol is not None and state.active is not None and not bool(state.active.any())


def _raised(energy: Energy, plan: Curvature, last: Secant, y: Params, pull: Params) -> Tensor:
    """L, raised to the slope of ∇f̂ between the last point and this one."""
    with torch.no_grad():
        length = energy.distance(tree.detach(y), last.y)
        slope = energy.distance(tree.detach(pull), last.pull) / tree.or_one(length)
        told = (length > SHORTEST * plan.length) & (slope > last.constant)
        return torch.where(told, slope, last.constant)
