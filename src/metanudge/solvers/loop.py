"""Seam 2: how an inner problem is solved. One loop for every solver; a solver is six small methods, or three.

A solve leaves a *schedule*: what was measured at its start, and the decisions (step sizes, restarts, stops) taken on
the way. The nudged solves replay it, or what the solver makes of it for solves that begin at the solution, so that they
differ from each other in the nudge alone: their solve errors then cancel in the finite difference (docs/theory.md,
matched solves).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from metanudge.energy import Energy
from metanudge.types import Need, Params, Schedule, Solution


class Solver(Protocol):
    """An inner solver. Frozen settings; what changes during a solve is in its state.

    Attributes:
        differentiable: Whether its steps are plain tensor arithmetic that autograd can follow.
    """

    differentiable: ClassVar[bool]

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot do without."""
        ...

    @property
    def steps(self) -> int:
        """Steps of a solve (at most, where it can stop early)."""
        ...

    def plan(self, energy: Energy, start: Params) -> Any:
        """Measure, on the free problem, what all matched solves share: step sizes and the like."""
        ...

    def init(self, energy: Energy, start: Params, plan: Any) -> Any:
        """Fresh state at ``start``."""
        ...

    def step(self, energy: Energy, plan: Any, state: Any, index: int, decision: Any) -> tuple[Any, Any]:
        """One step. Replay ``decision`` if given, else decide; return the new state and the decision."""
        ...

    def settle(self, schedule: Schedule, steps: int) -> Schedule:
        """From what the free solve did, the ``steps`` of nudged solves that begin at its solution."""
        ...

    def point(self, state: Any) -> Params:
        """The current iterate."""
        ...

    def finished(self, state: Any) -> bool:
        """Whether no lane needs another step."""
        ...


class FixedSteps:
    """What a solver is that measures nothing, and always takes all its steps."""

    def plan(self, energy: Energy, start: Params) -> Any:
        """Nothing to measure."""

    def settle(self, schedule: Schedule, steps: int) -> Schedule:
        """The same steps everywhere."""
        return schedule._replace(decisions=[None] * steps)

    def finished(self, state: Any) -> bool:
        """All steps are always taken."""
        return False


Observer = Callable[[int, Params], None]


def advance(
    solver: Solver, energy: Energy, schedule: Schedule, state: Any, steps: range, observe: Observer | None = None
) -> Any:
    """Take ``steps``, replaying the decisions that ``schedule`` holds and recording the others in it."""
    for index in steps:
        if solver.finished(state):
            break
        known = schedule.decisions[index] if index < len(schedule.decisions) else None
        state, decision = solver.step(energy, schedule.plan, state, index, known)
        if index == len(schedule.decisions):
            schedule.decisions.append(decision)
        if observe is not None:
            observe(index + 1, solver.point(state))
    return state


def solve(solver: Solver, energy: Energy, start: Params, observe: Observer | None = None) -> Solution:
    """Solve the free problem from ``start``; ``observe(k, phi_k)`` is called at k = 0, 1, ..., K."""
    schedule = Schedule(solver.plan(energy, start), [])
    if observe is not None:
        observe(0, start)
    # what it begins with has no name here, and so is let go after the first step
    state = advance(solver, energy, schedule, solver.init(energy, start, schedule.plan), range(solver.steps), observe)
    return Solution(solver.point(state), schedule)


def replay(solver: Solver, energy: Energy, start: Params, schedule: Schedule) -> Params:
    """Solve a problem by a schedule: its number of steps, step sizes, decisions; fresh state.

    Args:
        solver: The solver that made ``schedule``.
        energy: The nudged problem.
        start: Where to begin.
        schedule: What the free solve left, or that settled.
    """
    steps = range(len(schedule.decisions))
    state = advance(solver, energy, schedule, solver.init(energy, energy.lanes(start), schedule.plan), steps)
    return solver.point(state)
