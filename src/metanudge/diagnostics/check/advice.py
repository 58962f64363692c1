"""What the rows mean, in words, and a setting that would do."""

from __future__ import annotations

from collections.abc import Sequence

from metanudge import advice
from metanudge.diagnostics.check.reference import Reference
from metanudge.diagnostics.check.result import GOOD, CheckRow, Recommendation, percent
from metanudge.diagnostics.check.sweep import Sweep, with_steps
from metanudge.learner import MetaLearner


def recommend(sweep: Sweep, learner: MetaLearner, proxes: Sequence[float]) -> Recommendation | None:
    """The fewest steps that do, at the smallest of ``proxes`` at which any do."""
    steps = learner.solver.steps
    for weight in proxes:
        if weight == 0:
            continue
        for factor in (1, 2, 4, 8, 16):
            solver = with_steps(learner.solver, factor * steps)
            if solver is None or solver.steps > 128:
                break
            row = sweep.row("", "", solver, weight, learner.estimator)
            if row.relative_error < 0.8 * GOOD:  # a margin, for other tasks than these
                return Recommendation(solver.steps, weight, row.relative_error, row.gradients)
    return None


def verdict(
    rows: list[CheckRow],
    learner: MetaLearner,
    recommendation: Recommendation | None,
    kinked: bool,
    largest: float,
    reference: Reference,
) -> str:
    """The verdict."""
    mine, steps, prox = rows[0], learner.solver.steps, learner.prox
    said = []
    if mine.relative_error < GOOD:
        said.append(f"Good: the estimate is {percent(mine.relative_error)} from the exact meta-gradient.")
    else:
        said.append(f"Bad: the estimate is {percent(mine.relative_error)} from the exact meta-gradient.")
        if mine.residual > advice.DONE:
            said.append(f"The inner problem is {percent(mine.residual)} from solved.")
    if recommendation is not None:
        changes = []
        if recommendation.steps != steps:
            changes.append(f"steps from {steps} to {recommendation.steps}")
        if recommendation.prox != prox:
            changes.append(f"prox from {prox:g} to {recommendation.prox:g}")
        said.append(
            f"Raise {' and '.join(changes)}: the error was then {percent(recommendation.relative_error)}, for "
            f"{recommendation.gradients:.0f} gradients a task instead of {mine.gradients:.0f}."
        )
    elif mine.relative_error >= GOOD:
        said.append(f"No number of steps up to 128 and no prox up to {largest:g} brought it below 10 %.")
    if kinked:
        said.append(
            "The loss has kinks near these parameters (ReLU, max-pooling): exact second derivatives see one smooth "
            "piece, a finite displacement averages over many, so the two differ however many the steps, and training "
            "may well be better for the average (docs/theory.md). With a smooth activation (GELU, tanh) they agree."
        )
    if reference.residual > 1e-3:
        said.append(
            f"Beware: the reference itself is {percent(reference.residual)} from solved; raise reference_steps, or "
            "prox, before trusting the errors."
        )
    return " ".join(said)
