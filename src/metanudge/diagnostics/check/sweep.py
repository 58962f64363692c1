"""One setting after the other against the exact meta-gradient."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from metanudge.diagnostics.check.bench import Bench, alone, measured
from metanudge.diagnostics.check.reference import References
from metanudge.diagnostics.check.result import CheckRow
from metanudge.diagnostics.memory import LiveBytes
from metanudge.errors import LossError, NonFiniteError, SettingsError
from metanudge.estimators import ESTIMATORS, FOBMAML
from metanudge.estimators.base import Estimator
from metanudge.learner import MetaLearner
from metanudge.probe import with_steps
from metanudge.solvers import Solver
from metanudge.types import Need

NAN = float("nan")


class Sweep:
    """Measures settings, each against the reference at its own λ; ``rows`` are all it has measured.

    ``tell`` hears of every setting before it is measured.
    """

    def __init__(self, bench: Bench, references: References, tell: Callable[[str], object]) -> None:
        self.bench, self.references, self.tell = bench, references, tell
        self.rows: list[CheckRow] = []
        self.own_nu = 0.0

    def yours(self) -> CheckRow:
        """The learner as it is."""
        learner = self.bench.learner
        return self.measure("yours", _short(learner.estimator), learner.solver, learner.prox)

    def vary(self, compare: Sequence[str]) -> None:
        """Its steps, ν, prox and other estimators varied."""
        learner = self.bench.learner
        solver, prox, steps, estimator = learner.solver, learner.prox, learner.solver.steps, learner.estimator
        for factor in (0.5, 2, 4):
            other = with_steps(solver, max(1, round(factor * steps)))
            if other is not None and other.steps != steps:
                self.measure("steps", f"steps={other.steps}", other, prox)
        if isinstance(estimator, FOBMAML):
            if estimator.nu != "auto":
                self.measure("nu", "nu=auto", solver, prox, dataclasses.replace(estimator, nu="auto"), nu="auto")
            for nu in (factor * self.own_nu for factor in (0.01, 0.1, 10) if self.own_nu):
                self.measure("nu", f"nu={nu:.2g}", solver, prox, dataclasses.replace(estimator, nu=nu), nu=nu)
        for weight in (0.1 * prox, 10 * prox) if rests_on_prox(estimator) else ():
            self.measure("prox", f"prox={weight:g}", solver, weight)
        for name in compare:
            if not isinstance(estimator, ESTIMATORS[name]):
                self.measure("estimator", name, solver, prox, ESTIMATORS[name]())

    def own(self) -> list[CheckRow]:
        """The rows with the learner's estimator."""
        return [row for row in self.rows if row.group != "estimator"]

    def measure(
        self,
        group: str,
        label: str,
        solver: Solver,
        prox: float,
        estimator: Estimator | None = None,
        nu: float | str | None = None,
    ) -> CheckRow:
        """Measure one setting, that of the learner where nothing else is given."""
        self.tell(label)
        row = CheckRow(group, label, solver.steps, prox, NAN, float("inf"), NAN, NAN, NAN, 0, NAN, nu)
        failures = (NonFiniteError,) if group == "yours" else (NonFiniteError, SettingsError, LossError, RuntimeError)
        try:
            learner = self.bench.make(self.bench.model, solver, prox, estimator or self.bench.learner.estimator)
            row = self._compared(row, learner)
        except failures as error:
            row = row._replace(note=str(error).split("\n")[0].split(";")[0].split(". ")[0])
        self.rows.append(row)
        return row

    def _compared(self, row: CheckRow, learner: MetaLearner) -> CheckRow:
        tasks = self.bench.tasks
        with LiveBytes() as live:
            gradient, step = measured(learner, tasks)
        begun = time.perf_counter()
        measured(learner, tasks)
        seconds = time.perf_counter() - begun
        if row.group == "yours":
            self.own_nu = step.nu
        whole = reference = self.references.at(row.prox)
        if step.dropped_tasks or whole.tasks != self.bench.everyone:  # then the tasks that both have
            common = tuple(place for place in whole.tasks if alone(learner, tasks[place]))
            if not common:
                raise NonFiniteError("no task has an estimate and an exact meta-gradient")
            reference = self.references.at(row.prox, common)
            gradient, step = measured(learner, [tasks[place] for place in common])
        exact = reference.gradient
        scale = exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)
        return row._replace(
            cosine=float(gradient @ exact / (gradient.norm().clamp_min(1e-300) * scale)),
            relative_error=float((gradient - exact).norm() / scale),
            error_bound=step.error_bound,
            residual=step.residual,
            gradients=step.gradient_evaluations / len(reference.tasks),
            peak_bytes=live.peak,
            seconds=seconds,
            dropped=len(whole.tasks) - len(reference.tasks),
            trusted=reference.trusted,
            uncertainty=reference.uncertainty,
        )


def rests_on_prox(estimator: Estimator) -> bool:
    """Whether another prox is worth measuring: one that does not estimate this gradient at any is mended by none."""
    return Need.PROXIMAL_TERM in estimator.needs


def _short(estimator: Any) -> str:
    """Without the settings that are the defaults."""
    if not dataclasses.is_dataclass(estimator):
        return type(estimator).__name__
    told = [
        f"{field.name}={getattr(estimator, field.name)!r}"
        for field in dataclasses.fields(estimator)
        if getattr(estimator, field.name) != field.default
    ]
    return f"{type(estimator).__name__}({', '.join(told)})"
