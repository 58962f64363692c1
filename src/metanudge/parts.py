"""The meta-gradient of a meta-step's tasks, some of them at a time, to save memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metanudge.accumulation import Lengths
from metanudge.batching import split
from metanudge.errors import NonFiniteError
from metanudge.learner import MetaLearner
from metanudge.types import MetaStep, Tasks


def backward(
    learner: MetaLearner,
    batch: Tasks | list[Tasks],
    indices: list[int],
    at_once: int | None,
    parameters: list[nn.Parameter],
) -> MetaStep:
    """As ``learner.backward`` of all tasks, into ``.grad`` that is None; parts count by the tasks that were kept."""
    given = indices if learner.warm_start is not None else None
    if at_once is None or at_once >= len(indices):
        return learner.backward(batch, given)
    found: list[MetaStep] = []
    lengths: list[Lengths] = []
    kept: list[int] = []
    mean: list[Tensor | None] = [None] * len(parameters)
    failure: NonFiniteError | None = None
    for first in range(0, len(indices), at_once):
        part, members = _part(batch, first, at_once), indices[first : first + at_once]
        for parameter in parameters:
            parameter.grad = None
        learner._told.first = first  # of what is told of single tasks
        try:
            step = learner.backward(part, None if given is None else members)
        except NonFiniteError as error:
            failure = error
            continue
        finally:
            learner._told.first = 0
        found.append(step)
        lengths.append(learner._told.lengths)
        kept.append(len(members) - step.dropped_tasks)
        for place, parameter in enumerate(parameters):
            gradient, before = parameter.grad, mean[place]
            if gradient is not None:
                mean[place] = gradient if before is None else before.lerp_(gradient, kept[-1] / sum(kept))
    for parameter, gradient in zip(parameters, mean, strict=True):
        parameter.grad = gradient
    if not found:
        assert failure is not None
        raise failure
    return _merged(found, lengths, kept, len(indices), mean)


def _part(batch: Tasks | list[Tasks], first: int, size: int) -> Tasks | list[Tasks]:
    if isinstance(batch, list):
        return batch[first : first + size]
    return next(part for place, (part, _) in enumerate(split(batch, size)) if place == first // size)


def _merged(
    found: list[MetaStep], lengths: list[Lengths], kept: list[int], total: int, gradient: list[Tensor | None]
) -> MetaStep:
    """Several steps as one: means by the tasks kept, sums of what is counted, of the error bound the ratio of means."""

    def mean(name: str, of: Sequence[MetaStep | Lengths] = found) -> float:
        return float(sum(n * getattr(one, name) for n, one in zip(kept, of, strict=True)) / sum(kept))

    squares = [leaf.double().square().sum() for leaf in gradient if leaf is not None]
    return MetaStep(
        mean("query_loss"),
        mean("support_loss"),
        mean("residual"),
        Lengths(mean("error", lengths), mean("size", lengths)).bound,
        sum(step.amplified_tasks for step in found),
        mean("nu"),
        float(torch.stack(squares).sum().sqrt()),
        total - sum(kept),
        sum(step.gradient_evaluations for step in found),
    )
