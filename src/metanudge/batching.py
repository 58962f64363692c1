"""Stacks of tasks: stacking, splitting, and the order of what is in them."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader

from metanudge.checks import check_axes, check_not_empty, check_stack, leaves
from metanudge.errors import SettingsError, TasksError, UnmappableError
from metanudge.metrics import counted
from metanudge.minibatches import as_minibatches
from metanudge.sources import check_loader, is_dataset, taken
from metanudge.types import Batch, Tasks


def as_stacks(tasks: Tasks | Sequence[Tasks], device: torch.device) -> tuple[list[Tasks], list[int]]:
    """Turn a stack, or a list of single tasks of any sizes, into checked stacks: tasks of equal shapes go together.

    Returns the stacks, and for every task in their order its place in what was given.

    Raises:
        TasksError: Nothing given, or something that is no stack of tasks.
    """
    if isinstance(tasks, Tasks):
        number = check_stack(tasks, device)
        check_axes(tasks)
        return [ordinary(tasks)], list(range(number))
    if isinstance(tasks, Batch) or not isinstance(tasks, list | tuple):
        if isinstance(tasks, DataLoader):
            check_loader(tasks)
        loop = "; loop over it: for tasks in loader: learner.backward(tasks)" if hasattr(tasks, "__iter__") else ""
        if isinstance(tasks, Batch):
            loop = ", one set of examples; a task has two: mn.Tasks(support=batch, query=another)"
        if isinstance(tasks, Mapping):
            loop = "; give mn.Tasks(support=mn.Batch(...), query=mn.Batch(...))"
        elif is_dataset(tasks):  # whose single tasks a loop would give as if they were stacks
            loop = f", a dataset of single tasks; give some as a list: {taken(tasks)}"
        raise TasksError(f"expected mn.Tasks or a list of mn.Tasks, got {type(tasks).__name__}{loop}")
    if not tasks:
        raise TasksError("the list of tasks is empty; give at least one task")
    groups: dict[Any, list[int]] = {}
    for place, task in enumerate(tasks):
        if not isinstance(task, Tasks):
            cut = isinstance(task, Batch)  # a stack that was taken for a list, or cut as one
            pair = "; mn.Tasks is a pair, not a list of tasks: stack.take(n), stack.unstack() give some" if cut else ""
            raise TasksError(f"expected a list of mn.Tasks, found {type(task).__name__} in it{pair}")
        if as_minibatches(task.query):
            raise TasksError("mn.Minibatches are for the support of a task; give its query as mn.Batch")
        if as_minibatches(task.support):
            groups[place] = [place]
            continue
        check_not_empty(task, f" of task {place} (counted from 0)")
        groups.setdefault(form(task), []).append(place)
    stacks = [_checked([tasks[place] for place in group], device) for group in groups.values()]
    return stacks, [place for group in groups.values() for place in group]


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


Given = TypeVar("Given", Tasks, Batch)


def ordinary(given: Given) -> Given:
    """The same, as data: without graphs, and where tensors were made in inference mode as ones that autograd takes."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.clone() if leaf.is_inference() else leaf.detach() if leaf.requires_grad else leaf

    return tree_map(plain, given)  # type: ignore[no-any-return]


def stacked(given: Sequence[Given]) -> Given:
    """Tasks, or sets, of equal shapes as one with an axis of tasks."""
    return tree_map(lambda *same: torch.stack(same), *given)  # type: ignore[no-any-return]


def form(task: Tasks) -> Hashable:
    """Equal for tasks that can be stacked.

    Raises:
        TasksError: A leaf is not a tensor.
    """
    return str(tree_flatten(task)[1]), tuple((leaf.shape, leaf.dtype) for leaf in leaves(task))


def _checked(tasks: list[Tasks], device: torch.device) -> Tasks:
    """A checked stack of tasks of equal shapes; of one with minibatches, only the query is stacked."""
    first = tasks[0]
    if as_minibatches(first.support):
        return _checked([Tasks(first.query, first.query)], device)._replace(support=first.support)
    stack = ordinary(stacked(tasks))
    check_stack(stack, device)
    return stack


def split(tasks: Tasks, size: int | None) -> Iterator[tuple[Tasks, int]]:
    """Cut a stack into stacks of at most ``size`` tasks, each with its number of tasks."""
    if as_minibatches(tasks.support):
        raise UnmappableError(
            'mn.Minibatches are taken one task after the other; give the MetaLearner execution="in_place", and an '
            "estimator that runs there, such as FOBMAML"
        )
    number = leaves(tasks)[0].shape[0]
    step = size or number
    for first in range(0, number, step):
        yield tree_map(lambda leaf, first=first: leaf[first : first + step], tasks), min(step, number - first)


def single(tasks: Tasks) -> Iterator[Tasks]:
    """The tasks of a stack, one after the other, without the task axis."""
    if as_minibatches(tasks.support):
        (only,) = single(tasks._replace(support=tasks.query))
        yield only._replace(support=tasks.support)
        return
    yield from tasks.unstack()


def singles(tasks: Tasks) -> list[Tasks]:
    """The tasks of a stack, wherever it is, as a list.

    Raises:
        TasksError: No stack of tasks.
    """
    ((stack,), _) = as_stacks(tasks, next((leaf.device for leaf in leaves(tasks)), torch.device("cpu")))
    return stack.unstack()


class Piece(NamedTuple):
    """Consecutive examples of a set, and their share in a mean over the whole."""

    rows: slice
    share: float

    def of(self, batch: Batch) -> Batch:
        """These examples; tensors without an axis are whole."""
        found: Batch = tree_map(lambda leaf: leaf[self.rows] if leaf.ndim else leaf, batch)
        return found


def pieces(weights: Sequence[int], size: int) -> list[Piece]:
    """Cut a set into pieces of at most ``size`` examples, but for those without weight."""
    total, cuts = sum(weights), [slice(first, first + size) for first in range(0, len(weights), size)]
    return [Piece(cut, share) for cut in cuts if (share := sum(weights[cut]) / total)]


def counts_of(batch: Batch) -> list[int]:
    """How many targets of every example count: of a tensor those other than -100 and NaN.

    1 of each where all count, or none, or the targets are no single tensor.

    Raises:
        TasksError: Its tensors do not agree on the number of examples, their leading axis.
    """
    number, targets = examples(batch), batch.targets
    if not isinstance(targets, Tensor) or targets.ndim == 0:
        return [1] * number
    there = ~targets.isnan() if targets.is_floating_point() or targets.is_complex() else counted(targets)
    counts: list[int] = there.reshape(number, -1).sum(1).tolist()
    return counts if len(set(counts)) > 1 else [1] * number


def examples(batch: Batch) -> int:
    """How many a task's batch holds.

    Raises:
        TasksError: Its tensors do not agree on that, their leading axis.
    """
    numbers = {leaf.shape[0] for leaf in leaves(batch) if leaf.ndim > 0}
    if len(numbers) != 1:
        raise TasksError(
            "microbatch cuts a task's batch along the leading axis of its tensors, the examples, but they have "
            f"{', '.join(map(str, sorted(numbers))) or 'no'} of them; leave out microbatch, or give them one such axis"
        )
    return numbers.pop()
