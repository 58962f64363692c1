"""The exact meta-gradient, as nearly as the user's loss allows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metanudge.diagnostics.check.bench import Bench, measured
from metanudge.errors import LossError, SettingsError
from metanudge.estimators import FOBMAML, IMAML
from metanudge.estimators.base import Estimator
from metanudge.solvers import Nesterov


class Reference(NamedTuple):
    """∇F.

    Attributes:
        gradient: As one float64 vector.
        residual: Relative residual of its solve.
        how: How it was had.
    """

    gradient: Tensor
    residual: float
    how: str


class References:
    """∇F at every λ asked for, each once."""

    def __init__(self, bench: Bench, steps: int) -> None:
        self.bench, self.steps = bench, steps
        self.known: dict[float, Reference] = {}

    def at(self, prox: float) -> Reference:
        """∇F at this λ."""
        if prox not in self.known:
            self.known[prox] = self._exact(prox)
        return self.known[prox]

    def _exact(self, prox: float) -> Reference:
        bench = self.bench
        model, tasks = bench.double or (bench.model, bench.tasks)
        solver = Nesterov(self.steps)
        kind = "float64" if bench.double else str(next(model.parameters()).dtype).removeprefix("torch.")
        ways: list[tuple[str, Estimator, dict[str, str]]] = [
            (
                "conjugate gradients on exact Hessian products",
                IMAML(cg_steps=300, tol=1e-8),
                {"execution": "vectorized"},
            ),
            ("a fourth-order stencil", FOBMAML("fourth_order", nudge="linear"), {}),
        ]
        failure: Exception | None = None
        for how, estimator, settings in ways:
            try:
                learner = bench.make(model, solver, prox, estimator, **settings)
                gradient, step = measured(learner, tasks)
            except (LossError, SettingsError, RuntimeError) as error:
                failure = error
                continue
            return Reference(gradient, step.residual, f"{how}, {self.steps} steps, {kind}")
        raise SettingsError(f"no exact meta-gradient can be had: {failure}") from failure
