"""Which tasks every meta-step of a training takes, and drawing them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, Dataset, Sampler

from metanudge.errors import SettingsError, TasksError
from metanudge.ranks import ALONE, Ranks
from metanudge.sources import is_dataset
from metanudge.tasks.episodes import collate
from metanudge.tasks.seeding import stream
from metanudge.types import Batch, Tasks


class Order(Sampler[list[int]]):
    """Which tasks every meta-step takes: consecutive ones of an endless set, shuffled epochs of a finite one."""

    def __init__(self, number: int | None, size: int, seed: int, ranks: Ranks = ALONE) -> None:
        if number is not None and number < size:
            more = f"give tasks_per_step={number} or fewer, or more tasks" if number else "give some"
            raise SettingsError(f"a meta-step takes {size} different tasks, but there are {number}; {more}")
        if size < ranks.size:
            raise SettingsError(
                f"{ranks.size} ranks share the tasks of a meta-step, and there are {size}; give tasks_per_step="
                f"{ranks.size} or more"
            )
        self.number, self.size, self.seed, self.ranks = number, size, seed, ranks
        self.first = self.last = 0
        self._shuffled: tuple[int, Tensor] | None = None  # the epoch of the last look, and its order

    def at(self, step: int) -> list[int]:
        """Indices of the tasks of meta-step ``step``, from 0."""
        if self.number is None:
            return list(range(step * self.size, (step + 1) * self.size))
        per_epoch = self.number // self.size  # what is left over waits for another epoch's order
        epoch, place = divmod(step, per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, torch.randperm(self.number, generator=stream(self.seed, epoch), device="cpu")
        indices: list[int] = self._shuffled[1][place * self.size : (place + 1) * self.size].tolist()
        return indices

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's tasks in the steps asked for."""
        own = self.ranks.part(self.size)
        return (self.at(step)[own.start : own.stop] for step in range(self.first, self.last))

    def batches(
        self, tasks: Dataset[Tasks] | Sequence[Tasks], first: int, last: int, workers: int, device: torch.device
    ) -> Iterator[tuple[list[int], Tasks | list[Tasks]]]:
        """Meta-steps first .. last - 1: this rank's indices, and tasks. Torch's own random state is left alone."""
        self.first, self.last = first, last
        whole: Any = tasks  # of a list, DataLoader's types know nothing
        loader: Any = DataLoader(
            whole,
            batch_sampler=self,
            collate_fn=collate,
            num_workers=workers,
            generator=torch.Generator(),
        )
        with torch.device("cpu"):  # where the loader's own draws are, whatever the default device
            pairs = zip(self, loader, strict=True)
        return ((indices, moved(batch, device)) for indices, batch in pairs)


def first_digest(tasks: Any) -> str | None:
    """A digest of the first task, by which a set of tasks is known again; None for one drawn anew at every look."""
    with torch.random.fork_rng(devices=[]):
        digests = {_digest(tasks[0]) for _ in range(2)}
    return digests.pop() if len(digests) == 1 else None


def digest_of(tasks: Any, drawn_from: Any) -> str | None:
    """A digest of all ``tasks``; None where they come from a dataset that draws them anew at every look."""
    if is_dataset(drawn_from) and first_digest(drawn_from) is None:
        return None
    return _digest(tasks if isinstance(tasks, Tasks) else list(tasks))


def _digest(task: Any) -> str | None:
    leaves, form = tree_flatten(task)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    digest = hashlib.sha256(str(form).encode())
    for leaf in leaves:
        plain = leaf.detach().cpu().contiguous()
        digest.update(
            f"{plain.dtype} {tuple(plain.shape)}".encode() + plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:12]


def moved(tasks: Tasks | Sequence[Tasks], device: torch.device) -> Any:
    """The same tasks on ``device``: a stack, or a list of single ones."""
    return tasks.to(device) if isinstance(tasks, Tasks) else [task.to(device) for task in tasks]


def length(tasks: Dataset[Tasks] | Sequence[Tasks]) -> int | None:
    """How many tasks there are; None without an end.

    Raises:
        TasksError: No dataset of single tasks.
    """
    if isinstance(tasks, list | tuple) and not isinstance(tasks, Tasks | Batch):
        odd = next((type(task).__name__ for task in tasks if not isinstance(task, Tasks)), None)
        if odd is not None:
            raise TasksError(f"expected a list of single mn.Tasks, found {odd} in it; give mn.Tasks alone")
    elif not is_dataset(tasks):
        if isinstance(tasks, DataLoader):
            raise TasksError(
                "fit makes its own batches (tasks_per_step=, workers=), got a DataLoader; give its dataset of single "
                "tasks, loader.dataset"
            )
        raise TasksError(
            "fit takes a map-style dataset of tasks, such as mn.tasks.episodes(mn.tasks.sinusoid) or "
            f"mn.tasks.few_shot(...), a list of single mn.Tasks, or a stack of them, got {type(tasks).__name__}"
        )
    try:
        return len(tasks)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_single(tasks: Any) -> None:
    """Raise a TasksError for a dataset of something else than tasks, such as images with their classes."""
    if not is_dataset(tasks):
        return
    with torch.random.fork_rng(devices=[]):
        try:
            first = tasks[0]
        except (IndexError, KeyError):  # an empty one, told of elsewhere
            return
    if not isinstance(first, Tasks):
        raise TasksError(
            f"fit takes a dataset of single mn.Tasks, and the first item of this {type(tasks).__name__} is "
            f"{type(first).__name__}; of examples with their classes make tasks: mn.tasks.few_shot(dataset, ways=5, "
            "shots=1)"
        )
