"""The end of a meta-step: what the user is told of it, and the mean that is added to ``.grad``."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from metanudge import advice
from metanudge.accumulation import FiniteMean, Numbers
from metanudge.errors import NonFiniteError, NonFiniteWarning, SettingsError, UnsolvedWarning
from metanudge.estimators import Estimator
from metanudge.oracle.common import whole
from metanudge.solvers import Solver
from metanudge.types import Need


def in_order(indices: Sequence[int] | None, places: list[int], warm: bool) -> list[int]:
    """The indices of tasks, or their places, in the order in which they are solved.

    Raises:
        SettingsError: Indices without a warm start, or the other way round; ones that do not name every task once.
    """
    if (indices is not None) != warm:
        given, wanted = ("no ", "give indices=[...]") if indices is None else ("", "give the learner a warm_start")
        raise SettingsError(f"backward got {given}indices of tasks: indices and warm_start go together; {wanted}")
    if indices is None:
        return places
    try:
        listed = [operator.index(index) for index in indices]
    except TypeError as error:
        raise SettingsError(f"indices must be whole numbers, one a task: {error}") from error
    if len(listed) != len(places) or len(set(listed)) < len(listed):
        raise SettingsError(
            f"indices must name every task once, {len(places)} different whole numbers, got {len(listed)} of which "
            f"{len(set(listed))} differ"
        )
    return [listed[place] for place in places]


def verdict(
    mean: FiniteMean, estimator: Estimator, solver: Solver, prox: float, told: set[type[Warning]]
) -> tuple[Numbers, int]:
    """Means over the kept tasks, and how many were dropped; warns, once, of what is not as it should be.

    Raises:
        NonFiniteError: No task is left.
    """
    if mean.kept == 0:
        raise NonFiniteError(
            f"none of the {mean.total} tasks had a solve that did not diverge and a finite loss and meta-gradient, "
            "so nothing was changed; look for "
            "non-finite inputs, or let the inner solver take smaller steps (lr) or hold it closer (prox)"
        )
    numbers, dropped = mean.numbers(), mean.total - mean.kept
    if dropped:
        _tell_once(
            told,
            NonFiniteWarning,
            f"{dropped} of {mean.total} tasks diverged, or had no finite loss or meta-gradient, and were left out "
            "of the mean (MetaStep.dropped_tasks counts them from now on); let the inner solver take smaller steps "
            "(lr) or hold it closer (prox)",
        )
    if Need.PROXIMAL_TERM in estimator.needs:
        if numbers.residual > advice.ROUGH:
            _tell_once(told, UnsolvedWarning, advice.unsolved(numbers.residual, solver.steps, prox))
        elif 2 * numbers.amplified_tasks > mean.kept:
            _tell_once(told, UnsolvedWarning, advice.amplified(numbers.amplified_tasks, mean.kept, prox))
    return numbers, dropped


def _tell_once(told: set[type[Warning]], kind: type[Warning], text: str) -> None:
    if kind not in told:
        told.add(kind)
        warnings.warn(text, kind, stacklevel=4)  # where ``backward`` was called


def add_to_grad(model: nn.Module, mean: FiniteMean) -> float:
    """Add the mean meta-gradient, which is used up, to ``.grad``; returns its norm."""
    parameters, squares = dict(model.named_parameters()), []
    with torch.no_grad():
        for name, leaf in mean.spend():
            squares.append(whole(leaf.double().square().sum()))
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = leaf.to(parameter.dtype)
            else:
                parameter.grad.add_(leaf)
    return float(torch.stack(squares).sum().sqrt())
