"""Tasks by index, for a loader: any process draws the same ones, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from metanudge.batching import form, stacked
from metanudge.errors import SettingsError, TasksError
from metanudge.minibatches import as_minibatches
from metanudge.settings import check_steps
from metanudge.types import Tasks


class Episodes(Dataset[Tasks]):
    """A map-style dataset of single tasks; task i is a pure function of i.

    Args:
        draw: From an index to a single task, without a task axis; picklable, if workers are spawned.
        number: How many tasks there are; None for no end.
        arbitrary_labels: Whether it numbers the classes of a task at random, as ``few_shot`` does, so that
            ``metanudge evaluate`` scores it under several permutations of them.

    Raises:
        SettingsError: A number below 1.

    Example:
        >>> import metanudge as mn
        >>> from torch.utils.data import DataLoader
        >>> tasks = mn.tasks.episodes(mn.tasks.sinusoid, shots=5, number=100)
        >>> loader = DataLoader(tasks, batch_size=25, collate_fn=mn.tasks.collate)
        >>> next(iter(loader)).support.inputs.shape
        torch.Size([25, 5, 1])
        >>> len(tasks.take(3))
        3
    """

    def __init__(
        self, draw: Callable[[int], Tasks], number: int | None = None, *, arbitrary_labels: bool = False
    ) -> None:
        if number is not None:
            check_steps(number, "number")
        self.draw = draw
        self.number = number
        self.arbitrary_labels = arbitrary_labels

    def __getitem__(self, index: int) -> Tasks:
        """Task ``index``, without a task axis."""
        given: object = index
        if isinstance(given, slice):
            raise TypeError(
                "tasks are drawn one by one, dataset[i]; of several make a list: dataset.take(number, first)"
            )
        index = int(index)
        if self.number is not None and index < 0:
            index += self.number
        if index < 0 or (self.number is not None and index >= self.number):
            raise IndexError(f"there is no task {index}; there are {self.number or 'endless'}, from 0")
        return self.draw(index)

    def __len__(self) -> int:
        """Return the number of tasks.

        Raises:
            TypeError: There is no end to them.
        """
        if self.number is None:
            raise TypeError("these tasks have no end; give number=, or draw with take(number, first)")
        return self.number

    def __iter__(self) -> Iterator[Tasks]:
        """One task after the other."""
        index = 0
        while self.number is None or index < self.number:
            yield self.draw(index)
            index += 1

    def take(self, number: int, first: int = 0) -> list[Tasks]:
        """Tasks first .. first + number - 1, as ``backward`` and ``evaluate`` take them."""
        return [self[index] for index in range(first, first + number)]


def episodes(family: Callable[..., Tasks], *, number: int | None = None, **settings: Any) -> Episodes:
    """Make a family of tasks (``mn.tasks.sinusoid`` and the like, with its settings) a dataset for a loader.

    Args:
        family: ``family(number, first=..., **settings)`` draws a stack of tasks.
        number: How many tasks; None for no end.
        **settings: Of the family, such as ``shots`` and ``seed``.

    Raises:
        SettingsError: Settings the family does not have.

    Example:
        >>> import metanudge as mn
        >>> mn.tasks.episodes(mn.tasks.sinusoid, seed=3)[7].query.targets.shape
        torch.Size([10, 1])
    """
    made = Episodes(partial(_single, family, settings), number)
    try:
        made[0]
    except TypeError as error:
        raise SettingsError(f"{getattr(family, '__name__', family)} does not take these settings: {error}") from error
    return made


def _single(family: Callable[..., Tasks], settings: dict[str, Any], index: int) -> Tasks:
    task: Tasks = tree_map(lambda leaf: leaf[0], family(1, first=index, **settings))
    return task


def collate(tasks: Sequence[Tasks]) -> Tasks | list[Tasks]:
    """The ``collate_fn`` of a loader of tasks: a stack where all have the same shapes, otherwise the list.

    Tasks whose support is ``mn.Minibatches`` stay a list, too.

    Raises:
        TasksError: No tasks.
    """
    if not tasks:
        raise TasksError("there are no tasks to collate")
    if any(as_minibatches(task.support) for task in tasks):
        return list(tasks)
    if len(set(map(form, tasks))) > 1:
        return list(tasks)
    return stacked(tasks)
