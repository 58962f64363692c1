"""N-way K-shot episodes of any labelled dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from metanudge.errors import SettingsError, TasksError
from metanudge.settings import check_steps
from metanudge.tasks.episodes import Episodes
from metanudge.tasks.seeding import stream
from metanudge.types import Batch, Tasks

Range = int | tuple[int, int]
"""A number, or the smallest and the largest of those to draw from."""


def few_shot(
    dataset: Dataset[Any],
    ways: Range,
    shots: Range,
    queries: int,
    *,
    classes: Sequence[int] | None = None,
    number: int | None = None,
    seed: int = 0,
) -> Episodes:
    """Make episodes of a map-style dataset whose items are (input tensor, class).

    A task draws ``ways`` classes, names them 0 .. ways - 1 in the order drawn (so labels are permuted from task to
    task), and of each class ``shots`` examples to adapt to and ``queries`` others to judge. It is a pure function of
    (seed, index).

    Args:
        dataset: With ``__len__`` and ``__getitem__``. Classes are read from ``targets`` or ``labels``, from a
            ``TensorDataset`` or a ``Subset`` of those; otherwise every item is looked at once.
        ways: Classes N of a task, or a range (least, most) from which every task draws its own.
        shots: Support examples of a class, or a range likewise.
        queries: Query examples of a class.
        classes: Draw from these classes alone; None for all. Give disjoint ones to training, validation and test.
        number: How many tasks; None for no end.
        seed: Of the episodes.

    Returns:
        Tasks of inputs ``[N * n, ...]`` and targets ``[N * n]`` (int64), grouped by class. Tasks of unequal sizes come
        out of a loader with ``collate_fn=mn.tasks.collate`` as a list.

    Raises:
        SettingsError: Fewer classes than ways, or a class with fewer than shots + queries examples.
        TasksError: When drawn: items that are not (tensor, class).

    Example:
        >>> import torch, metanudge as mn
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(60, 3), torch.arange(60) % 6)
        >>> task = mn.tasks.few_shot(data, ways=5, shots=1, queries=4)[0]
        >>> task.support.inputs.shape, task.query.targets.shape
        (torch.Size([5, 3]), torch.Size([20]))
    """
    least_ways, most_ways = _range("ways", ways)
    least_shots, most_shots = _range("shots", shots)
    check_steps(queries, "queries")
    labels = labels_of(dataset)
    members = {int(kind): np.flatnonzero(labels == kind) for kind in np.unique(labels)}
    if classes is not None:
        missing = sorted(set(classes) - set(members))
        if missing:
            raise SettingsError(f"the dataset has no examples of class {missing[0]}; it has {_some(sorted(members))}")
        members = {int(kind): members[int(kind)] for kind in dict.fromkeys(classes)}
    if len(members) < most_ways:
        raise SettingsError(f"tasks of {most_ways} ways need as many classes, but there are {len(members)}")
    smallest = min(members, key=lambda kind: len(members[kind]))
    if len(members[smallest]) < most_shots + queries:
        raise SettingsError(
            f"{most_shots} shots and {queries} queries need {most_shots + queries} examples of every class, but class "
            f"{smallest} has {len(members[smallest])}; draw fewer, or leave it out with classes="
        )
    drawn = (least_ways, most_ways), (least_shots, most_shots)
    return Episodes(_FewShot(dataset, tuple(members.values()), *drawn, queries, seed), number, arbitrary_labels=True)


@dataclass(frozen=True)
class _FewShot:
    """Draws a task; a class of its own, so that it can be pickled."""

    dataset: Any
    members: tuple[Any, ...]
    ways: tuple[int, int]
    shots: tuple[int, int]
    queries: int
    seed: int

    def __call__(self, index: int) -> Tasks:
        generator = stream(self.seed, index)

        def between(bounds: tuple[int, int]) -> int:
            return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator, device="cpu"))

        ways, shots = between(self.ways), between(self.shots)
        support: list[int] = []
        query: list[int] = []
        for kind in torch.randperm(len(self.members), generator=generator, device="cpu")[:ways].tolist():
            places = self.members[kind]
            order = torch.randperm(len(places), generator=generator, device="cpu")
            chosen = places[order[: shots + self.queries].numpy()].tolist()
            support += chosen[:shots]
            query += chosen[shots:]
        return Tasks(self._batch(support, ways), self._batch(query, ways))

    def _batch(self, places: list[int], ways: int) -> Batch:
        inputs = [_input(self.dataset[place]) for place in places]
        return Batch(torch.stack(inputs), torch.arange(ways, device="cpu").repeat_interleave(len(places) // ways))


def _input(item: Any) -> Tensor:
    if not isinstance(item, tuple | list) or len(item) < 2 or not isinstance(item[0], Tensor):
        found = type(item[0]).__name__ if isinstance(item, tuple | list) and item else type(item).__name__
        raise TasksError(
            f"items of the dataset must be (input tensor, class), but the input is {found}; give the dataset a "
            "transform that makes tensors"
        )
    return item[0]


def labels_of(dataset: Any) -> Any:
    """The class of every item of a map-style dataset, as an array of int64.

    Raises:
        SettingsError: No length, or classes that are no whole numbers.
    """
    arrays = Tensor | np.ndarray
    several = isinstance(dataset, tuple | list) and any(isinstance(part, arrays) for part in dataset)
    if several or isinstance(dataset, arrays | Mapping | str):
        raise SettingsError(
            "few_shot takes a map-style dataset of (input tensor, class), got "
            f"{type(dataset).__name__}{' of tensors' if several else ''}; of tensors x and y make "
            "torch.utils.data.TensorDataset(x, y)"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise SettingsError(f"few_shot needs a map-style dataset (__len__, __getitem__), got {type(dataset).__name__}")
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[-1]
    else:
        found = next((getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None)
    if found is None:
        items = [dataset[index] for index in range(len(dataset))]
        odd = next((type(item).__name__ for item in items if not isinstance(item, tuple | list) or len(item) < 2), None)
        if odd is not None:
            raise SettingsError(
                f"few_shot takes a map-style dataset of (input tensor, class), but found {odd} in it; of tensors x and "
                "y make torch.utils.data.TensorDataset(x, y)"
            )
        found = [item[1] for item in items]
    labels = np.asarray(found.cpu() if isinstance(found, Tensor) else found)
    words = any(isinstance(label, str) for label in labels.flat)
    if labels.ndim != 1 or len(labels) != len(dataset) or not np.issubdtype(labels.dtype, np.integer):
        raise SettingsError(
            f"few_shot needs a whole number for each of the {len(dataset)} items as its class, got "
            + ("strings; number them" if words else f"shape {labels.shape}, type {labels.dtype}")
        )
    return labels.astype(np.int64)


def _range(name: str, given: Range) -> tuple[int, int]:
    least, most = given if isinstance(given, tuple) and len(given) == 2 else (given, given)
    for bound in (least, most):
        check_steps(bound, name)
    if least > most:
        raise SettingsError(f"{name} must be a whole number or (least, most), got {given!r}")
    return least, most


def _some(values: list[int]) -> str:
    told = ", ".join(str(value) for value in values[:10])
    return told + (f", ... ({len(values)} in all)" if len(values) > 10 else "")
