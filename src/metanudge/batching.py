"""Stacks of tasks: checking, splitting, stacking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from metanudge.errors import TasksError
from metanudge.minibatches import as_minibatches
from metanudge.types import Batch, Tasks


def leaves(tree: Any) -> list[Tensor]:
    """All tensors of a pytree.

    Raises:
        TasksError: A leaf is not a tensor.
    """
    found = tree_flatten(tree)[0]
    for leaf in found:
        if isinstance(leaf, np.ndarray):
            raise TasksError(
                "tasks hold tensors or pytrees of tensors, but found a numpy array of "
                f"{leaf.dtype} {list(leaf.shape)}; make it a tensor: torch.from_numpy(array)"
            )
        if not isinstance(leaf, Tensor):
            raise TasksError(f"tasks hold tensors or pytrees of tensors, but found {type(leaf).__name__}: {leaf!r:.80}")
    return found


def wrapped(given: object) -> str:
    """How what is no batch becomes one."""
    if isinstance(given, Mapping):
        return "; inputs may be any pytree of tensors: mn.Batch(inputs={...}, targets=...)"
    pair = isinstance(given, tuple | list) and len(given) == 2
    return "; wrap it: mn.Batch(x, y)" if pair else ""


def check_stack(tasks: Tasks, device: torch.device) -> int:
    """Return the number of tasks stacked on the leading axis.

    Raises:
        TasksError: Not a stack of at least one task on ``device``.
    """
    if not isinstance(tasks, Tasks):
        raise TasksError(f"expected mn.Tasks(support=..., query=...), got {type(tasks).__name__}")
    sizes = set()
    for part, batch in zip(Tasks._fields, tasks, strict=True):
        if as_minibatches(batch):
            raise TasksError(
                f"the {part} of a stack can not be mn.Minibatches, which is the support of one task: give such tasks "
                "as a list of mn.Tasks, without a task axis"
            )
        if not isinstance(batch, Batch):
            raise TasksError(
                f"the {part} of mn.Tasks must be mn.Batch(inputs, targets), got {type(batch).__name__}{wrapped(batch)}"
            )
        found = leaves(batch)
        if not found:
            raise TasksError(f"the {part} batch holds no tensor")
        check_device(found, device)
        for leaf in found:
            if leaf.ndim == 0:
                raise TasksError(f"a tensor of the {part} batch has no axis; tasks are stacked on the leading one")
            sizes.add((part, leaf.shape[0]))
    numbers = {size for _, size in sizes}
    if len(numbers) > 1:
        told = ", ".join(f"{part} {size}" for part, size in sorted(sizes))
        raise TasksError(
            f"the leading axis counts the tasks and must be the same in every tensor, but found {told}; "
            "for tasks of different sizes give a list of mn.Tasks, one each, without a task axis"
        )
    (number,) = numbers
    if number == 0:
        raise TasksError("the stack of tasks is empty (leading axis 0); give at least one task")
    for part, batch in zip(Tasks._fields, tasks, strict=True):
        for leaf in leaves(batch):
            if leaf.numel() == 0:
                raise TasksError(
                    f"a tensor of the {part} batch is empty, its shape is {tuple(leaf.shape)}; every task needs at "
                    "least one example"
                )
    return number


def _check_axes(stack: Tasks) -> None:
    """Raise a TasksError where every task would be one vector and one class index, neither with an axis of examples."""
    for part, batch in zip(Tasks._fields, stack, strict=True):
        inputs, targets = batch
        if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor) or targets.is_floating_point():
            continue
        if inputs.ndim <= 2 and targets.ndim == 1:
            raise TasksError(
                f"the targets of the {part} batch have the shape {tuple(targets.shape)}: class indices of a stack of "
                "tasks are [tasks, examples]. If these are the examples of one task, give it as a list, "
                "[mn.Tasks(...)], or every tensor a leading axis, .unsqueeze(0)"
            )


def check_device(tensors: list[Tensor], device: torch.device) -> None:
    """Raise a TasksError where a tensor is not on ``device``."""
    for tensor in tensors:
        if tensor.device != device:
            raise TasksError(
                f"the model is on {device} but a tensor of the tasks on {tensor.device}; move it with .to()"
            )


def as_stacks(tasks: Tasks | Sequence[Tasks], device: torch.device) -> tuple[list[Tasks], list[int]]:
    """Turn a stack, or a list of single tasks of any sizes, into checked stacks: tasks of equal shapes go together.

    Returns the stacks, and for every task in their order its place in what was given.

    Raises:
        TasksError: Nothing given, or something that is no stack of tasks.
    """
    if isinstance(tasks, Tasks):
        number = check_stack(tasks, device)
        _check_axes(tasks)
        return [tasks], list(range(number))
    if isinstance(tasks, Batch) or not isinstance(tasks, list | tuple):
        if isinstance(tasks, DataLoader):
            _check_loader(tasks)
        loop = "; loop over it: for tasks in loader: learner.backward(tasks)" if hasattr(tasks, "__iter__") else ""
        if is_dataset(tasks):  # whose single tasks a loop would give as if they were stacks
            loop = f", a dataset of single tasks; give some as a list: {_taken(tasks)}"
        raise TasksError(f"expected mn.Tasks or a list of mn.Tasks, got {type(tasks).__name__}{loop}")
    if not tasks:
        raise TasksError("the list of tasks is empty; give at least one task")
    groups: dict[Any, list[int]] = {}
    for place, task in enumerate(tasks):
        if not isinstance(task, Tasks):
            raise TasksError(f"expected a list of mn.Tasks, found {type(task).__name__} in it")
        if as_minibatches(task.query):
            raise TasksError("mn.Minibatches are for the support of a task; give its query as mn.Batch")
        if as_minibatches(task.support):
            groups[place] = [place]
            continue
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves(task))
        groups.setdefault((shapes, str(tree_flatten(task)[1])), []).append(place)
    stacks = [_stacked([tasks[place] for place in group], device) for group in groups.values()]
    return stacks, [place for group in groups.values() for place in group]


def _stacked(tasks: list[Tasks], device: torch.device) -> Tasks:
    """A checked stack of tasks of equal shapes; of one with minibatches, only the query is stacked."""
    first = tasks[0]
    if as_minibatches(first.support):
        return _stacked([Tasks(first.query, first.query)], device)._replace(support=first.support)
    stack: Tasks = tree_map(lambda *same: torch.stack(same), *tasks)
    check_stack(stack, device)
    return stack


def not_finite(stacks: list[Tasks], places: list[int]) -> dict[int, str]:
    """Of the tasks whose own tensors hold NaN or infinite numbers: place, and which tensors."""
    found: dict[int, list[str]] = {}
    first = 0
    for stack in stacks:
        number = 1 if as_minibatches(stack.support) else leaves(stack)[0].shape[0]
        for part, batch in zip(Tasks._fields, stack, strict=True):
            if as_minibatches(batch):
                continue
            for field, held in zip(Batch._fields, batch, strict=True):
                wrong = [~leaf.isfinite().reshape(number, -1).all(1) for leaf in leaves(held)]
                for row in torch.stack(wrong).any(0).nonzero().flatten().tolist() if wrong else []:
                    found.setdefault(places[first + row], []).append(f"{part} {field}")
        first += number
    return {place: " and ".join(found[place]) for place in sorted(found)}


def split(tasks: Tasks, size: int | None) -> Iterator[tuple[Tasks, int]]:
    """Cut a stack into stacks of at most ``size`` tasks, each with its number of tasks."""
    if as_minibatches(tasks.support):
        raise TasksError('mn.Minibatches are taken one task after the other; give the MetaLearner execution="in_place"')
    number = leaves(tasks)[0].shape[0]
    step = size or number
    for first in range(0, number, step):
        yield tree_map(lambda leaf, first=first: leaf[first : first + step], tasks), min(step, number - first)


def smaller(tasks: Tasks, size: int | None) -> list[Tasks]:
    """The same cut, where one of minibatches is a single task already."""
    return [tasks] if as_minibatches(tasks.support) else [stack for stack, _ in split(tasks, size)]


def single(tasks: Tasks) -> Iterator[Tasks]:
    """The tasks of a stack, one after the other, without the task axis."""
    if as_minibatches(tasks.support):
        (only,) = single(tasks._replace(support=tasks.query))
        yield only._replace(support=tasks.support)
        return
    for index in range(leaves(tasks)[0].shape[0]):
        yield tree_map(lambda leaf, index=index: leaf[index], tasks)


def singles(tasks: Tasks) -> list[Tasks]:
    """The tasks of a stack, wherever it is, as a list.

    Raises:
        TasksError: No stack of tasks.
    """
    stacks, _ = as_stacks(tasks, next((leaf.device for leaf in leaves(tasks)), torch.device("cpu")))
    return [task for stack in stacks for task in single(stack)]


def pieces(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float]]:
    """Cut a task's batch into batches of at most ``size`` examples, each with its share of them.

    Raises:
        TasksError: Its tensors do not agree on the number of examples, their leading axis.
    """
    if size is None:
        yield batch, 1.0
        return
    numbers = {leaf.shape[0] for leaf in leaves(batch) if leaf.ndim > 0}
    if len(numbers) != 1:
        raise TasksError(
            "microbatch cuts a task's batch along the leading axis of its tensors, the examples, but they have "
            f"{', '.join(map(str, sorted(numbers))) or 'no'} of them; leave out microbatch, or give them one such axis"
        )
    (number,) = numbers
    for first in range(0, number, size):
        last = min(first + size, number)
        piece = tree_map(lambda leaf, a=first, b=last: leaf[a:b] if leaf.ndim else leaf, batch)
        yield piece, (last - first) / number


def groups(
    tasks: Tasks | Iterable[Tasks] | Dataset[Tasks], most: int | None = None
) -> Iterator[Tasks | Sequence[Tasks]]:
    """What an evaluation takes at a time: a stack, a list of single tasks, or one item of a loader after the other.

    A map-style dataset holds single tasks, as for ``fit``; it becomes the list of its first ``most``, or all.
    """
    if isinstance(tasks, Tasks | list | tuple):
        yield tasks
    elif is_dataset(tasks):
        yield listed(tasks, most)
    elif isinstance(tasks, DataLoader):
        _check_loader(tasks)
        yield from (_drawn(stack, tasks) for stack in tasks)
    elif isinstance(tasks, Iterable) and not isinstance(tasks, Batch):
        yield from tasks
    else:
        raise TasksError(f"expected mn.Tasks, a list of them or a loader, got {type(tasks).__name__}")


def is_dataset(tasks: object) -> bool:
    """Whether it is map-style, and so a set of single tasks, where an iterable is a loader of stacks."""
    if isinstance(tasks, Tasks | Batch | Tensor | list | tuple | str | Mapping | IterableDataset):
        return False
    return isinstance(tasks, Dataset) or hasattr(tasks, "__getitem__")


_LOADER = (
    "DataLoader(dataset, batch_size=N, collate_fn=mn.tasks.collate), the dataset itself, or, where these are stacks "
    "after all, (tasks for tasks in loader)"
)


def _check_loader(loader: DataLoader[Any]) -> None:
    """Raise a TasksError where a loader hands on what a map-style dataset holds, single tasks, one by one.

    A sampler of lists asks the dataset itself for several at a time; of an IterableDataset nothing is known.
    """
    asks_for_lists = isinstance(loader.sampler, BatchSampler)
    if loader.batch_sampler is None and not isinstance(loader.dataset, IterableDataset) and not asks_for_lists:
        raise TasksError(
            "expected a loader of stacks of tasks, got a DataLoader with batch_size=None, which gives the single tasks "
            f"of its dataset, whose examples would be taken for tasks; give {_LOADER}"
        )


def _drawn(stack: Any, loader: DataLoader[Any]) -> Any:
    """What a loader made of single tasks, unless it is more tasks than it drew: the examples of a single one.

    Raises:
        TasksError: It is.
    """
    if loader.batch_size is None or isinstance(loader.dataset, IterableDataset) or not isinstance(stack, Tasks):
        return stack
    number = max((leaf.shape[0] for leaf in leaves(stack) if leaf.ndim), default=0)
    if number > loader.batch_size and not as_minibatches(stack.support):
        raise TasksError(
            f"expected a stack of at most {loader.batch_size} tasks, which the DataLoader draws at a time, but its "
            f"collate_fn gave leading axes of {number}, as of the examples of a single task; give {_LOADER}"
        )
    return stack


def listed(tasks: Any, most: int | None = None) -> list[Tasks]:
    """The tasks of a map-style dataset, or its first ``most``.

    Raises:
        TasksError: It has no end.
    """
    try:
        number = len(tasks)
    except TypeError as error:
        raise TasksError(
            f"this {type(tasks).__name__} of tasks has no end; use {_taken(tasks)} for its first n tasks as a list"
        ) from error
    return [tasks[index] for index in range(number if most is None else min(number, most))]


def _taken(tasks: object) -> str:
    """How to have the first tasks of a dataset as a list."""
    return ".take(n)" if hasattr(tasks, "take") else "[dataset[i] for i in range(n)]"
