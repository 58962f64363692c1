"""Validation during a training: on fixed tasks, without a trace in the training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from metanudge import metrics
from metanudge.accumulation import summarize
from metanudge.batching import as_stacks, split
from metanudge.checks import check_stack, leaves, not_finite
from metanudge.errors import NonFiniteWarning, SettingsError, TasksError
from metanudge.learner import MetaLearner
from metanudge.metrics import metric_name
from metanudge.oracle.common import device_of, same_modes
from metanudge.random_state import forked
from metanudge.sources import is_dataset, listed
from metanudge.types import Evaluation, LossFunction, Tasks
from metanudge.warned import warn

Better = Literal["auto", "smaller", "larger"]


def fixed(tasks: Tasks | Sequence[Tasks] | Dataset[Tasks] | None) -> Tasks | Sequence[Tasks] | None:
    """Validation tasks as a stack or a list; None for none.

    Raises:
        SettingsError: None in the list.
        TasksError: Something else, or a dataset without an end.
    """
    if tasks is None or isinstance(tasks, Tasks):
        return tasks
    if is_dataset(tasks):
        tasks = listed(tasks)
    if not isinstance(tasks, list | tuple):
        cure = "; give its dataset, loader.dataset" if isinstance(tasks, DataLoader) else ""
        raise TasksError(
            "validation must be a stack of mn.Tasks, or a list or finite map-style dataset of single ones, got "
            f"{type(tasks).__name__}{cure}"
        )
    if not tasks:
        raise SettingsError("validation holds no tasks; give some, or None for no validation")
    return tasks


def number_of(tasks: Tasks | Sequence[Tasks]) -> int:
    """How many validation tasks there are."""
    return check_stack(tasks, leaves(tasks)[0].device) if isinstance(tasks, Tasks) else len(tasks)


def improves(score: float, best: float, sign: float) -> bool:
    """Whether ``score`` is better; ``sign`` 1 for smaller is better, -1 for larger. NaN is worse than any number."""
    if math.isnan(score) or math.isnan(best):
        return not math.isnan(score)
    return sign * score < sign * best


@dataclass
class Validation:
    """The validation of a training.

    Attributes:
        learner: What is trained.
        tasks: Fixed; None for no validation.
        metric: None for the query loss.
        size: Tasks at a time.
        found: The last evaluation.
    """

    learner: MetaLearner
    tasks: Tasks | Sequence[Tasks] | None
    metric: LossFunction | None
    size: int
    found: Evaluation | None = None
    _told: bool = False

    def look(self, step: int, *, quiet: bool = False) -> Evaluation | None:
        """Evaluate, where there are tasks, without dropout; the training's random state and mode stay.

        Warns:
            NonFiniteWarning: The score is NaN; once, unless it is to be ``quiet``.
        """
        if self.tasks is None:
            return None
        found = self.found = self._scores(self.tasks)
        if math.isnan(found.mean) and not self._told and not quiet:
            self._told = True
            _tell_not_finite(found, self.tasks, step, device_of(self.learner.model))
        return found

    def _scores(self, tasks: Tasks | Sequence[Tasks]) -> Evaluation:
        """Ranks share the tasks; where there are not enough for each to have one, everyone takes them all."""
        model, ranks = self.learner.model, self.learner.ranks
        number = number_of(tasks)
        shared = 1 < ranks.size <= number
        own = ranks.part(number) if shared else range(number)
        with same_modes(model), forked(device_of(model)):
            model.eval()
            found = self.learner._scores(_pieces(tasks, own, self.size), self.metric)
        if ranks.size == 1:
            return found
        values = torch.zeros(number, found.values.shape[1], dtype=found.values.dtype, device=ranks.device)
        if shared or ranks.first:  # where all did the same, round-off must not decide for each alone what is best
            values[own.start : own.stop] = found.values
        ranks.sum([values])
        return summarize(values.cpu(), found.metric)


def _tell_not_finite(found: Evaluation, tasks: Tasks | Sequence[Tasks], step: int, device: torch.device) -> None:
    """Warn of a score that is NaN, naming the tasks that make it so."""
    places = (~found.values[:, -1].isfinite()).nonzero().flatten().tolist()
    held = not_finite(*as_stacks(tasks, device))
    wrong = [place for place in places if place in held]
    why = "their data are finite: the adapted model or the metric is not"
    if wrong:
        why = (
            f"task {wrong[0]} holds NaN or infinite numbers in its {' and '.join(held[wrong[0]])}: mend such tasks or "
            "leave them out"
        )
    warn(
        f"the validation score at meta-step {step} is NaN, of {len(places)} of {len(found.values)} tasks (from 0: "
        f"{', '.join(map(str, places[:5]))}{', ...' if len(places) > 5 else ''}); {why}. It counts as worse than any "
        "number",
        NonFiniteWarning,
    )


def _pieces(tasks: Tasks | Sequence[Tasks], own: range, size: int) -> Iterator[Any]:
    """The ``own`` ones of the tasks, ``size`` at a time."""
    if isinstance(tasks, Tasks):
        mine: Tasks = tree_map(lambda leaf: leaf[own.start : own.stop], tasks)
        yield from (piece for piece, _ in split(mine, size))
    else:
        yield from (tasks[first : min(first + size, own.stop)] for first in range(own.start, own.stop, size))


def larger_is_better(better: Better, metric: LossFunction | None) -> bool:
    """What ``better`` says of ``metric``; "auto": accuracy should grow, losses shrink.

    Raises:
        SettingsError: Something else; "auto" for a metric of one's own.
    """
    if better not in ("auto", "smaller", "larger"):
        raise SettingsError(f'better must be "auto", "smaller" or "larger", got {better!r}')
    if better == "auto" and metric not in (None, metrics.accuracy, metrics.squared_error, metrics.cross_entropy):
        raise SettingsError(
            f"the best weights are kept, and of {metric_name(metric)}, a metric of your own, it is not known whether a "
            'larger or a smaller one is better; say so: better="larger" or better="smaller"'
        )
    return better == "larger" or (better == "auto" and metric is metrics.accuracy)
