"""Tasks with their classes renamed: how a classifier's outputs are called should not count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metanudge.errors import TasksError
from metanudge.metrics import counted
from metanudge.tasks.seeding import stream
from metanudge.types import Batch, Tasks


def permuted(tasks: Tasks | Sequence[Tasks], number: int, first: int) -> Iterator[Tasks | Sequence[Tasks]]:
    """The tasks as they are, and ``number`` - 1 times with their class labels permuted, support and query alike.

    Args:
        tasks: A stack, or single tasks; the targets of a task are class indices ``[n]``.
        number: How many in all.
        first: Place of the first task in the whole evaluation, on which its permutations depend.

    Raises:
        TasksError: Targets that are no class labels.
    """
    if number > 1:
        for task in [tasks] if isinstance(tasks, Tasks) else tasks:
            for batch in task:
                _check_labels(batch, axes=2 if isinstance(tasks, Tasks) else 1)
    yield tasks
    for repetition in range(1, number):
        if isinstance(tasks, Tasks):
            pairs = zip(tasks.support.targets, tasks.query.targets, strict=True)
            renamed = [_renamed(*pair, stream(repetition, first + place)) for place, pair in enumerate(pairs)]
            yield _with_targets(tasks, *(torch.stack(same) for same in zip(*renamed, strict=True)))
        else:
            yield [
                _with_targets(
                    task, *_renamed(task.support.targets, task.query.targets, stream(repetition, first + place))
                )
                for place, task in enumerate(tasks)
            ]


def _renamed(support: Tensor, query: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The labels of one task under another naming of the classes it has."""
    both = torch.cat([support, query])
    named = counted(both)
    classes, places = torch.unique(both[named], return_inverse=True)
    both[named] = classes[torch.randperm(len(classes), generator=generator, device="cpu").to(classes.device)][places]
    return both[: len(support)], both[len(support) :]


def _with_targets(task: Tasks, support: Tensor, query: Tensor) -> Tasks:
    return Tasks(task.support._replace(targets=support), task.query._replace(targets=query))


def _check_labels(batch: object, axes: int) -> None:
    targets: Any = batch.targets if isinstance(batch, Batch) else batch
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    if not whole or targets.ndim != axes:
        told = f"{tuple(targets.shape)}, {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
        raise TasksError(
            f"label permutations need class indices, {'[T, n]' if axes == 2 else '[n]'} whole numbers, as targets, "
            f"got {told}; leave permutations at 1"
        )
