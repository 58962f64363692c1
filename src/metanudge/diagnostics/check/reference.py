"""The exact meta-gradient, as nearly as the user's loss allows, and whether it may be trusted."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metanudge.diagnostics.check.bench import Bench, alone, measured
from metanudge.diagnostics.check.implicit import Implicit
from metanudge.errors import LossError, SettingsError
from metanudge.estimators import FOBMAML
from metanudge.estimators.base import Estimator
from metanudge.solvers import Nesterov

SOLVED = 1e-3
"""Relative residual of its solve up to which a reference is trusted."""

CERTAIN = 0.01
"""Relative error of a reference, as far as it shows, up to which it is trusted."""


class Reference(NamedTuple):
    """∇F over some tasks.

    Attributes:
        gradient: As one float64 vector.
        tasks: Which tasks it is the mean of; those whose solve diverges, or that are not finite, are left out.
        residual: Relative residual of its solve.
        error: What is left of its linear system, or the bound of its stencil, relative to it.
        how: How it was had.
    """

    gradient: Tensor
    tasks: tuple[int, ...]
    residual: float
    error: float
    how: str

    @property
    def trusted(self) -> bool:
        """Whether it converged."""
        return self.residual <= SOLVED and self.error <= CERTAIN

    @property
    def uncertainty(self) -> float:
        """Relative error it may have: a solve that is not done can be off by anything."""
        return self.error if self.residual <= SOLVED and self.error >= 0 else float("inf")


class References:
    """∇F at every λ asked for, over all tasks or some, each once."""

    def __init__(self, bench: Bench, steps: int, kinked: bool) -> None:
        self.bench, self.steps, self.kinked = bench, steps, kinked
        self.known: dict[tuple[float, tuple[int, ...]], Reference] = {}

    def at(self, prox: float, tasks: tuple[int, ...] | None = None) -> Reference:
        """∇F at this λ.

        Raises:
            NonFiniteError: No task has one.
            SettingsError: There is no way to it.
        """
        key = prox, self.bench.everyone if tasks is None else tasks
        if key not in self.known:
            self.known[key] = self._exact(*key)
        return self.known[key]

    def _exact(self, prox: float, places: tuple[int, ...]) -> Reference:
        """By exact Hessian products where they exist, else by a stencil.

        Where the learner's own does not converge, it is tried again with more steps; on kinks that helps nobody.
        """
        lengths = (1, 4) if prox == self.bench.learner.prox and not self.kinked else (1,)
        ways: list[tuple[str, Estimator, str | None]] = [
            ("Newton's method and conjugate gradients on exact Hessian products", Implicit(), "vectorized"),
            ("a fourth-order stencil", FOBMAML("fourth_order", nudge="linear"), None),
        ]
        failure: Exception | None = None
        for how, estimator, execution in ways:
            try:
                for factor in lengths:
                    found = self._by(how, estimator, execution, factor * self.steps, prox, places)
                    if found.trusted:
                        break
            except (LossError, SettingsError, RuntimeError) as error:
                failure = error
                continue
            return found
        raise SettingsError(f"no exact meta-gradient can be had: {failure}") from failure

    def _by(
        self,
        how: str,
        estimator: Estimator,
        execution: str | None,
        steps: int,
        prox: float,
        places: tuple[int, ...],
    ) -> Reference:
        bench = self.bench
        model, tasks = bench.double or (bench.model, bench.tasks)
        kind = str(next(model.parameters()).dtype).removeprefix("torch.")
        learner = bench.make(model, Nesterov(steps), prox, estimator, execution)
        chosen = [tasks[place] for place in places]
        gradient, step = measured(learner, chosen)
        if step.dropped_tasks:
            places = tuple(place for place, task in zip(places, chosen, strict=True) if alone(learner, task))
            gradient, step = measured(learner, [tasks[place] for place in places])
        return Reference(gradient, places, step.residual, step.error_bound, f"{how}, {steps} steps, {kind}")
