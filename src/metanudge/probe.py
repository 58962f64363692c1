"""How many steps would solve the inner problem, found by taking them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor

from metanudge.energy import InnerProblem
from metanudge.errors import UnsolvedWarning
from metanudge.solvers.loop import Solver, advance
from metanudge.types import Role, Schedule

MOST = 20
"""At most so many times the solver's steps are tried,"""

LIMIT = 1000
"""and at most so many, or twice the solver's where that is more."""

GROWTH = 1.25
"""From one look at the residual to the next."""


class Needed(NamedTuple):
    """What more steps did.

    Attributes:
        steps: Steps that do, or after which the residual was lowest.
        residual: Mean relative residual after them.
        most: Steps that were taken.
    """

    steps: int
    residual: float
    most: int


class Probe(NamedTuple):
    """A problem that was solved, and how far each of its tasks was from done; on the device, nothing is copied.

    Attributes:
        query_loss: After adaptation, one a task.
        residual: Relative residuals, one a task.
        kept: Which of the tasks count.
        begun: In which of them the support loss is finite at the initialisation.
        solved: In which of them it is at the solution too, which is no further up than the solve began.
        problem: The problem; None where no more steps of it may be tried (``Execution.tries``).
        sampled: Whether its support set was seen through minibatches.
    """

    query_loss: Tensor
    residual: Tensor
    kept: Tensor
    begun: Tensor
    solved: Tensor
    problem: InnerProblem | None
    sampled: bool = False

    def mean(self) -> float:
        """Mean residual of the tasks that count."""
        return _mean(self.residual, self.kept)


def needed(probes: list[Probe], solver: Solver, good: float, fair: float) -> Needed | None:
    """Go on with one of ``probes``, the median in what is left to solve, until its residual is ``good``.

    A rate read off the residual alone flatters: the first steps take away what is steep, and what is left falls more
    slowly (20 steps were foretold where 138 were needed). Where ``good`` is out of reach, the first that is ``fair``,
    or else the lowest. None where nothing can be tried, where trying failed, or where nobody would hear of it.

    Cost: at most ``MOST`` times the solver's steps, and twenty gradients, of the tasks that are solved at once.
    """
    order = sorted((probe for probe in probes if bool(probe.kept.any())), key=Probe.mean)
    if not order:  # they are of other ranks
        return None
    median = order[len(order) // 2]
    longer = with_steps(solver, max(2 * solver.steps, min(MOST * solver.steps, LIMIT)))
    if median.problem is None or longer is None or not _heard(UnsolvedWarning):
        return None
    try:
        return _tried(median, median.problem, longer, solver.steps, good, fair)
    except Exception:  # whatever it is, memory or a loss that refuses far points: the meta-step itself went well
        return None


def with_steps(solver: Any, steps: int) -> Solver | None:
    """The solver with other steps; None for one that is no dataclass made from ``steps``, or that refuses them."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return None
    if not any(field.name == "steps" and field.init for field in dataclasses.fields(solver)):
        return None
    try:
        return cast(Solver, dataclasses.replace(solver, steps=steps))
    except (TypeError, ValueError):  # an __init__ of its own; a limit of its own
        return None


def _tried(probe: Probe, problem: InnerProblem, longer: Solver, first: int, good: float, fair: float) -> Needed:
    seen: list[tuple[int, float]] = []
    taken = first
    for taken, residual in _residuals(problem, probe.kept, longer, first):
        if math.isfinite(residual):
            seen.append((taken, residual))
        if residual <= good:
            break
    enough = [one for level in (good, fair) for one in seen if one[1] <= level]
    least = min(seen, key=lambda one: one[1], default=(first, probe.mean()))
    return Needed(*(enough[0] if enough else least), taken)


def _residuals(problem: InnerProblem, kept: Tensor, solver: Solver, first: int) -> Iterator[tuple[int, float]]:
    """Mean residual of the tasks that count after ``first`` steps from θ, and after more, up to those of ``solver``."""
    energy = problem.energy()
    start = problem.initial
    schedule = Schedule(solver.plan(energy, start), [])
    state, taken, upto = solver.init(energy, start, schedule.plan), 0, first
    while taken < solver.steps and not (taken and solver.finished(state)):
        state = advance(solver, energy, schedule, state, range(taken, upto))
        phi = solver.point(state)
        _, pull = problem.losses.value_and_gradient(Role.SUPPORT, phi, upto)
        yield upto, _mean(energy.balance(pull, phi).residual, kept)
        taken, upto = upto, min(math.ceil(GROWTH * upto), solver.steps)


def _mean(residual: Tensor, kept: Tensor) -> float:
    residual, kept = residual.reshape(-1).double(), kept.reshape(-1)
    return float(residual.where(kept, 0.0).sum() / kept.sum())


def _heard(kind: type[Warning]) -> bool:
    """Whether warnings of this kind are not ignored."""
    with warnings.catch_warnings(record=True) as heard:
        try:
            warnings.warn_explicit("", kind, "", 0, registry={})
        except Warning:
            return True
    return bool(heard)
