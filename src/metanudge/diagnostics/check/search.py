"""Looking for a setting that would do."""

from __future__ import annotations

from metanudge.diagnostics.check.result import SAFE, CheckRow, Recommendation
from metanudge.diagnostics.check.sweep import Sweep, with_steps

MOST = 128
"""Steps up to which is searched, or twice those of the learner where that is more."""


def search(sweep: Sweep, kinked: bool) -> None:
    """Measure more steps and larger proximal weights, up to the first weight at which anything does.

    At each weight the most steps come first: where they do not do, fewer hardly will.
    """
    solver, prox = sweep.bench.learner.solver, sweep.bench.learner.prox
    steps = [factor * solver.steps for factor in (16, 8, 4, 2, 1)]
    steps = [number for number in steps if number <= max(MOST, 2 * solver.steps)]
    if with_steps(solver, 1) is None:
        steps = [solver.steps]
    for factor in (1, 3, 10) if kinked else (1, 3, 10, 30, 100, 300):
        weight = factor * prox
        if not any(does(row) and row.prox == weight for row in sweep.own()):
            for number in steps:
                if not does(_row(sweep, number, weight)):
                    break
        if any(does(row) for row in sweep.own()):
            return


def does(row: CheckRow) -> bool:
    """Whether a row may be recommended."""
    return row.trusted and not row.dropped and row.relative_error < SAFE


def recommend(rows: list[CheckRow]) -> Recommendation | None:
    """The cheapest of ``rows`` that does; of equal ones the most exact."""
    good = [row for row in rows if does(row)]
    if not good:
        return None
    best = min(good, key=lambda row: (row.gradients, row.relative_error))
    return Recommendation(best.steps, best.prox, best.relative_error, best.gradients, best.nu)


def _row(sweep: Sweep, steps: int, prox: float) -> CheckRow:
    """That of the learner's estimator and ν, measured unless it has been."""
    for row in sweep.own():
        if (row.steps, row.prox, row.nu) == (steps, prox, None):
            return row
    solver = sweep.bench.learner.solver
    other = solver if steps == solver.steps else with_steps(solver, steps)
    assert other is not None
    return sweep.measure("search", f"steps={steps}, prox={prox:g}", other, prox)
