"""One setting after the other against the exact meta-gradient."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, cast

import torch

from metanudge.diagnostics.check.bench import Bench, measured
from metanudge.diagnostics.check.reference import References
from metanudge.diagnostics.check.result import CheckRow
from metanudge.diagnostics.memory import LiveBytes
from metanudge.errors import LossError, NonFiniteError, SettingsError
from metanudge.estimators import ESTIMATORS, FOBMAML
from metanudge.estimators.base import Estimator
from metanudge.solvers import Solver


class Sweep:
    """Measures settings, each against the reference at its own λ."""

    def __init__(self, bench: Bench, references: References) -> None:
        self.bench, self.references = bench, references
        self.last_nu = 1.0

    def rows(self, compare: Sequence[str]) -> list[CheckRow]:
        """The learner as it is, then steps, ν, prox and other estimators varied."""
        learner = self.bench.learner
        solver, prox, steps = learner.solver, learner.prox, learner.solver.steps
        rows = [self.row("yours", str(_short(learner.estimator)), solver, prox, learner.estimator)]
        for factor in (0.5, 2, 4):
            other = with_steps(solver, max(1, round(factor * steps)))
            if other is not None and other.steps != steps:
                rows.append(self.row("steps", f"steps={other.steps}", other, prox, learner.estimator))
        if isinstance(learner.estimator, FOBMAML):
            for factor in (0.01, 0.1, 10):
                nu = factor * self.last_nu
                rows.append(self.row("nu", f"nu={nu:.2g}", solver, prox, dataclasses.replace(learner.estimator, nu=nu)))
        rows += [
            self.row("prox", f"prox={weight:g}", solver, weight, learner.estimator)
            for weight in (0.1 * prox, 10 * prox)
            if weight
        ]
        rows += [
            self.row("estimator", name, solver, prox, ESTIMATORS[name]())
            for name in compare
            if not isinstance(learner.estimator, ESTIMATORS[name])
        ]
        return rows

    def row(self, group: str, label: str, solver: Solver, prox: float, estimator: Estimator) -> CheckRow:
        """Measure one setting."""
        nothing = float("nan")
        try:
            learner = self.bench.make(self.bench.model, solver, prox, estimator)
            exact = self.references.at(prox).gradient
            with LiveBytes() as live:
                gradient, step = measured(learner, self.bench.tasks)
            begun = time.perf_counter()
            measured(learner, self.bench.tasks)
            seconds = time.perf_counter() - begun
        except (SettingsError, LossError, NonFiniteError) as error:
            note = str(error).split(";")[0].split(". ")[0]
            return CheckRow(
                group, label, solver.steps, prox, nothing, float("inf"), nothing, nothing, nothing, 0, nothing, note
            )
        if group == "yours":
            self.last_nu = step.nu or 1.0
        scale = exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)
        return CheckRow(
            group,
            label,
            solver.steps,
            prox,
            float(gradient @ exact / (gradient.norm().clamp_min(1e-300) * scale)),
            float((gradient - exact).norm() / scale),
            step.error_bound,
            step.residual,
            step.gradient_evaluations / len(self.bench.tasks),
            live.peak,
            seconds,
        )


def with_steps(solver: Any, steps: int) -> Solver | None:
    """None for a solver that is no dataclass."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return None
    return cast(Solver, dataclasses.replace(solver, steps=steps))


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
