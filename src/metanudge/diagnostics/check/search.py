"""Looking for a setting that would do."""

from __future__ import annotations

import math

from metanudge.diagnostics.check.result import SAFE, CheckRow, Recommendation
from metanudge.diagnostics.check.sweep import Sweep, rests_on_prox
from metanudge.probe import with_steps

MOST = 256
"""Steps up to which is searched, or twice those of the learner where that is more."""


def search(sweep: Sweep, kinked: bool) -> None:
    """Measure more steps at the learner's own proximal weight, then at larger ones, up to the first that does.

    A larger weight is another objective, so it comes after all steps. At each weight the most steps come first: where
    they do not do, fewer hardly will.
    """
    solver, prox = sweep.bench.learner.solver, sweep.bench.learner.prox
    steps = [number for number in _lengths(solver.steps) if with_steps(solver, number) is not None] or [solver.steps]
    factors = (1, 3, 10) if kinked else (1, 3, 10, 30, 100, 300)
    for factor in factors if rests_on_prox(sweep.bench.learner.estimator) else (1,):
        weight = factor * prox
        if not any(does(row) and row.prox == weight for row in sweep.own()):
            for number in steps:
                if not does(_row(sweep, number, weight)):
                    break
        if any(does(row) and row.prox == weight for row in sweep.own()):
            return


def _lengths(own: int) -> list[int]:
    """Steps to try, the most first: doublings, and at any rate as many as are spoken of where none did."""
    most = max(MOST, 2 * own)
    doubled = {factor * own for factor in (32, 16, 8, 4, 2, 1)}
    return sorted((number for number in doubled | {most} if number <= most), reverse=True)


def does(row: CheckRow) -> bool:
    """Whether a row may be recommended."""
    certain = row.trusted or row.relative_error + row.uncertainty < SAFE
    return certain and not row.dropped and row.relative_error < SAFE


def recommend(rows: list[CheckRow], prox: float | None = None) -> Recommendation | None:
    """Of ``rows`` that do, the cheapest at this proximal weight (that of the first row), or else at the nearest."""
    good = [row for row in rows if does(row)]
    if not good:
        return None
    own = rows[0].prox if prox is None else prox

    def order(row: CheckRow) -> tuple[float, float, float]:
        return abs(math.log(row.prox / own)), row.gradients, row.relative_error

    best = min(good, key=order)
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
