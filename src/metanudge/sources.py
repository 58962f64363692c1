"""Where tasks come from: stacks, lists, datasets and loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from metanudge.checks import leaves
from metanudge.errors import TasksError
from metanudge.minibatches import as_minibatches
from metanudge.types import Batch, Tasks


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
        check_loader(tasks)
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


def check_loader(loader: DataLoader[Any]) -> None:
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
            f"this {type(tasks).__name__} of tasks has no end; use {taken(tasks)} for its first n tasks as a list"
        ) from error
    return [tasks[index] for index in range(number if most is None else min(number, most))]


def taken(tasks: object) -> str:
    """How to have the first tasks of a dataset as a list."""
    return ".take(n)" if hasattr(tasks, "take") else "[dataset[i] for i in range(n)]"
