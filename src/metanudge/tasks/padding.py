"""Tasks of different sizes, padded to one stack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_map

from metanudge.batching import form, stacked
from metanudge.checks import check_not_empty, leaves
from metanudge.errors import TasksError
from metanudge.metrics import IGNORED
from metanudge.minibatches import as_minibatches
from metanudge.sources import is_dataset, taken
from metanudge.types import Batch, Tasks


def pad(tasks: Sequence[Tasks]) -> Tasks:
    """Make one stack of single tasks with different numbers of examples, so that all are solved at once.

    A set that is shorter than the longest gets examples of its own once more, which no model can stumble over, with
    targets that say that they do not count: -100 for class indices, as everywhere in torch, and NaN for floats. The
    functions of ``mn.metrics`` leave both out, and so must a loss of your own; then the stack gives what the list does,
    unless examples see each other, as by BatchNorm. (With ``microbatch`` targets have to be one tensor for that, and no
    FSDP2 be there: else pieces weigh by their examples.) ``mn.fit`` takes the stack; for a loader this is a
    ``collate_fn``.

    Args:
        tasks: Single tasks, without a task axis, whose tensors differ in their leading axis alone.

    Returns:
        A stack: support ``[T, n, ...]``, n the most examples of a support set, and query alike.

    Raises:
        TasksError: No tasks, a stack, empty or mismatched tasks, ``mn.Minibatches``; targets without a value to spare.

    Example:
        >>> import torch, metanudge as mn
        >>> sets = [mn.Batch(torch.randn(n, 2), torch.arange(n)) for n in (2, 4)]
        >>> mn.tasks.pad([mn.Tasks(support=one, query=one) for one in sets]).support.targets
        tensor([[   0,    1, -100, -100],
                [   0,    1,    2,    3]])
    """
    if isinstance(tasks, Tasks):
        raise TasksError("expected a list of single tasks, got mn.Tasks: one, or a stack, whose tasks have one size")
    if not isinstance(tasks, list | tuple):
        cure = f"; give {taken(tasks)}" if is_dataset(tasks) else ""
        raise TasksError(f"expected a list of single tasks, got {type(tasks).__name__}{cure}")
    if not tasks:
        raise TasksError("there are no tasks to pad")
    for place, task in enumerate(tasks):
        _check(task, f"of task {place} (counted from 0)")
    firsts = [form(tree_map(lambda leaf: leaf[:1], task)) for task in tasks]
    other = next((place for place, first in enumerate(firsts) if first != firsts[0]), None)
    if other is not None:
        raise TasksError(
            f"tasks are padded to the same number of examples, but task {other} (counted from 0) differs from task 0 "
            f"in more than that: {tasks[other]} and {tasks[0]}; pad sequences before, with a mask that the model heeds"
        )
    return Tasks(*(_evened(sets) for sets in zip(*tasks, strict=True)))


def _check(task: Tasks, whose: str) -> None:
    """Raise a TasksError for what is no task, or whose sets are not of so many examples."""
    parts = {part: getattr(task, part, None) for part in Tasks._fields}
    if any(map(as_minibatches, parts.values())):
        raise TasksError("mn.Minibatches cannot be padded; give such tasks as a list")
    if not all(isinstance(batch, Batch) for batch in parts.values()):
        raise TasksError(f"expected a list of mn.Tasks of mn.Batch, found {type(task).__name__}: {task!r:.80}")
    check_not_empty(task, f" {whose}")
    for part, batch in parts.items():
        sizes = {len(leaf) if leaf.ndim else None for leaf in leaves(batch)}
        if len(sizes) != 1 or None in sizes:
            raise TasksError(
                f"the tensors of a set must all begin with the axis of its examples, but the {part} {whose} is {batch}"
            )


def _evened(sets: Sequence[Batch]) -> Batch:
    """Sets of different sizes as one of stacks."""
    longest = max(len(leaves(batch)[0]) for batch in sets)
    return stacked([_padded(batch, longest) for batch in sets])


def _padded(batch: Batch, longest: int) -> Batch:
    """A set with its first examples once more, uncounted."""
    length = len(leaves(batch)[0])
    if length == longest:
        return batch
    more = torch.arange(longest, device="cpu") % length
    again: Batch = tree_map(lambda leaf: leaf[more.to(leaf.device)], batch)
    marks = [_mark(leaf.dtype) for leaf in leaves(again.targets)]
    if all(mark in (None, False) for mark in marks):
        kinds = ", ".join(str(leaf.dtype) for leaf in leaves(again.targets)) or "there are none"
        raise TasksError(
            f"padding is marked by targets of -100 or NaN, which these cannot hold: {kinds}; give class indices as "
            ".long(), other targets as .float(), or such tasks as a list"
        )
    for leaf, mark in zip(leaves(again.targets), marks, strict=True):
        if mark is None:
            raise TasksError(f"padding cannot be marked in {leaf.dtype}; give .long() or .float()")
        leaf[length:] = mark
    return again


def _mark(kind: torch.dtype) -> float | None:
    """What targets that do not count hold; a mask beside them is False."""
    if kind.is_floating_point:
        return math.nan
    if kind is torch.bool:
        return False
    return IGNORED if kind.is_signed and not kind.is_complex else None
