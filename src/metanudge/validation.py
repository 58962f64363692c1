"""Validation during a training: on fixed tasks, without a trace in the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from metanudge import metrics
from metanudge.batching import check_stack, leaves, split
from metanudge.errors import SettingsError
from metanudge.learner import MetaLearner
from metanudge.types import Evaluation, LossFunction, Tasks

Better = Literal["auto", "smaller", "larger"]


def validate(
    learner: MetaLearner, tasks: Tasks | Sequence[Tasks], metric: LossFunction | None, at_once: int
) -> Evaluation:
    """Evaluate without dropout, ``at_once`` tasks at a time; the training's random state and mode stay."""
    model = learner.model
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.random.fork_rng():
            return learner.evaluate(_pieces(tasks, at_once), metric)
    finally:
        for module, mode in modes:
            module.training = mode


def _pieces(tasks: Tasks | Sequence[Tasks], size: int) -> Iterator[Any]:
    if isinstance(tasks, Tasks):
        check_stack(tasks, leaves(tasks)[0].device)
        yield from (piece for piece, _ in split(tasks, size))
    else:
        yield from (tasks[first : first + size] for first in range(0, len(tasks), size))


def larger_is_better(better: Better, metric: LossFunction | None) -> bool:
    """What ``better`` says of ``metric``; "auto": accuracies should grow, everything else shrink.

    Raises:
        SettingsError: Something else.
    """
    if better not in ("auto", "smaller", "larger"):
        raise SettingsError(f'better must be "auto", "smaller" or "larger", got {better!r}')
    return better == "larger" or (better == "auto" and metric is metrics.accuracy)


def called(metric: LossFunction | None) -> str:
    """A name for ``metric``."""
    return "query loss" if metric is None else getattr(metric, "__name__", "metric").replace("_", " ")
