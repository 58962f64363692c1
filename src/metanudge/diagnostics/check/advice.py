"""What the rows mean, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

from metanudge import advice
from metanudge.diagnostics.check.reference import CERTAIN, SOLVED, Reference
from metanudge.diagnostics.check.result import SAFE, CheckRow, Recommendation, percent
from metanudge.diagnostics.check.search import does, recommend
from metanudge.estimators import Estimator

KINKED = (
    "The loss has kinks near these parameters (ReLU, max-pooling): exact second derivatives see one smooth piece, a "
    "finite displacement averages over many, so the two differ however many the steps, and training may well be better "
    "for the average (docs/theory.md). With a smooth activation (GELU, tanh) they agree."
)


OBJECTIVE = (
    "prox is another objective (the larger, the nearer adaptation stays to the initialisation), and may train a worse "
    "model: judge it by validation"
)

ANY = 10.0
"""Relative error of a reference from which on it says nothing."""

RANDOM = (
    "The support loss is random from step to step ({}), so what follows compares different problems and means little: "
    "call model.eval() first."
)

WARM = (
    "All of this is without the warm start: solves begin at the initialisation, as adapt does. In training, tasks that "
    "come again begin at their last solution and are solved further; MetaStep.residual tells how far."
)


def verdict(
    rows: list[CheckRow],
    reference: Reference,
    tasks: int,
    kinked: bool,
    bad: Mapping[int, list[str]],
    warm: bool,
    noise: str = "",
    estimator: Estimator | None = None,
) -> str:
    """What was found, and what would mend it.

    ``bad`` are tasks with NaN in their data, and where; ``noise`` is what makes the support loss random; ``estimator``
    is the one that was judged.
    """
    mine = rows[0]
    own = [row for row in rows if row.group != "estimator"]
    said = [_judged(mine, reference, kinked)]
    if mine.dropped:
        said.append(f"{mine.dropped} of {tasks} tasks diverged, and the others were compared.")
    if len(reference.tasks) < tasks:
        said.append(f"Left out for want of an exact meta-gradient: {tasks - len(reference.tasks)} of {tasks} tasks.")
    if bad:
        said.append(f"{advice.bad_data(bad, tasks)}.")
    if mine.good is None:
        said += _elsewhere(own)
    elif not mine.good:
        bias = getattr(estimator, "bias", "")  # which one of the user's own may lack
        if bias.startswith("irreducible"):
            said.append(f"The bias of {type(estimator).__name__} is {bias}; no setting takes it away.")
        advised, others = _advised(own), _others(rows, recommend(own))
        kept = any(does(row) for row in own if row.prox == mine.prox)
        said += advised + others if kept else others + advised  # a change that keeps the objective comes first
    if kinked:
        said.append(KINKED)
    if warm:
        said.append(WARM)
    if noise:
        said.insert(0, RANDOM.format(noise))
    return " ".join(said)


def _judged(mine: CheckRow, reference: Reference, kinked: bool) -> str:
    """Good, bad, or not to be told."""
    if mine.good is None:
        why = []
        if not reference.residual <= SOLVED:
            why.append(f"its solve is {percent(reference.residual)} from done")
        if not reference.error <= CERTAIN:
            why.append(f"it may be off by {percent(reference.error) if reference.error < ANY else 'anything'}")
        more = "" if kinked else "; raise reference_steps, or prox"
        return f"No verdict: the exact meta-gradient to compare with did not converge, {' and '.join(why)}{more}."
    if mine.note:
        return f"Bad: there is no estimate: {mine.note}."
    known = "" if mine.trusted else f", which is itself known to {percent(mine.uncertainty)}"
    if mine.uncertainty == math.inf:
        known = f", whose own solve is {percent(reference.residual)} from done"
    word = "Good" if mine.good else "Bad"
    said = f"{word}: the estimate is {percent(mine.relative_error)} from the exact meta-gradient{known}."
    if not mine.good and mine.residual > advice.DONE:
        said += f" The inner problem is {percent(mine.residual)} from solved."
    return said


def _advised(own: list[CheckRow]) -> list[str]:
    """The recommendation, and a cheaper one at a larger prox; or that nothing did."""
    mine, best = own[0], recommend(own)
    if best is None:
        judged = [row for row in own if row.good is not None and not row.note]
        if not judged:
            return []
        tried = f"up to steps={max(row.steps for row in judged)} and prox={max(row.prox for row in judged):g}"
        return [f"None of {len(judged)} settings, {tried}, brought it below {percent(SAFE)}."]
    said = [f"{_change(mine, best)}: the error was then {_costs(mine, best)}."]
    if best.prox != mine.prox:
        return [*said, f"No steps did at your prox; another {OBJECTIVE}."]
    other = recommend([row for row in own if row.prox > mine.prox], mine.prox)
    if other is not None and other.gradients < best.gradients:
        said.append(f"Steps={other.steps} and prox={other.prox:g} have {_costs(mine, other)}, but another {OBJECTIVE}.")
    return said


def _elsewhere(own: list[CheckRow]) -> list[str]:
    """What can be told, where there is no verdict."""
    best = recommend(own)
    if best is None:
        return []
    where = f"With steps={best.steps} and prox={best.prox:g}"
    objective = f" Another {OBJECTIVE}." if best.prox != own[0].prox else ""
    return [f"{where} it converged, and the error was {_costs(own[0], best)}.{objective}"]


def _change(mine: CheckRow, to: Recommendation, first: str = "Raise") -> str:
    changes = []
    if to.steps != mine.steps:
        changes.append(f"steps from {mine.steps} to {to.steps}")
    if to.prox != mine.prox:
        changes.append(f"prox from {mine.prox:g} to {to.prox:g}")
    if to.nu is not None:
        changes.append(f"nu to {to.nu if isinstance(to.nu, str) else format(to.nu, '.2g')}")
    word = first if to.nu is None and to.steps >= mine.steps and to.prox >= mine.prox else "Set"
    return f"{word} {' and '.join(changes)}"


def _costs(mine: CheckRow, to: Recommendation) -> str:
    instead = ", as before" if to.gradients == mine.gradients else f" instead of {mine.gradients:.0f}"
    if mine.note:
        instead = ""
    return f"{percent(to.relative_error)}, for {to.gradients:.0f} gradients a task{instead}"


def _others(rows: list[CheckRow], best: Recommendation | None) -> list[str]:
    """The cheapest other estimator that does at the learner's own prox: for less, if more steps do there as well."""
    good = [row for row in rows if row.group == "estimator" and does(row)]
    if best is not None and best.prox == rows[0].prox:
        good = [row for row in good if row.gradients < best.gradients]
    if not good:
        return []
    other = min(good, key=lambda row: row.gradients)
    costs = f"{percent(other.relative_error)}, for {other.gradients:.0f} gradients"
    return [f"The estimator {other.label} has {costs}, with nothing else changed."]
