"""Families of tasks by name, for the command: training, validation and test tasks that never meet."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from metanudge import tasks
from metanudge.tasks.episodes import Episodes
from metanudge.tasks.image_folders import Split
from metanudge.tasks.mnist1d import Protocol
from metanudge.training.order import length
from metanudge.types import Tasks

FIRST = {"train": 0, "validation": 10**15, "test": 2 * 10**15}
"""Where a split's tasks begin in an endless family."""
PER_SEED = 10**9
"""Training tasks of a run, before those of the next seed begin."""
MOST_SEEDS = FIRST["validation"] // PER_SEED


def draw(
    family: Callable[..., Dataset[Tasks]], split: Split, seed: int, dtype: torch.dtype, number: int | None = None
) -> Dataset[Tasks]:
    """Tasks of a split: another part of an endless family for every split, and in training for every seed.

    Args:
        family: ``family(split)``.
        split: "train", "validation" or "test".
        seed: Of the run; validation and test tasks are the same for all.
        dtype: Of floating-point tensors.
        number: Take so many of an endless family; None for no end.
    """
    found = family(split=split)
    finite = length(found)
    first = 0 if finite is not None else FIRST[split] + (seed * PER_SEED if split == "train" else 0)
    return Episodes(
        partial(_shifted, found, first, dtype),
        number if finite is None else min(finite, number or finite),
        arbitrary_labels=getattr(found, "arbitrary_labels", False),
    )


def _shifted(found: Dataset[Tasks], first: int, dtype: torch.dtype, index: int) -> Tasks:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    task: Tasks = tree_map(cast, found[first + index])
    return task


def _generated(family: Callable[..., Tasks]) -> Callable[..., Episodes]:
    """A family that is one distribution, with no splits of its own."""

    @functools.wraps(family)
    def made(split: Split, **settings: Any) -> Episodes:  # noqa: ARG001
        return tasks.episodes(family, **settings)

    own = inspect.signature(family)
    kept = [value for name, value in own.parameters.items() if name not in ("number", "first", "dtype")]
    split = inspect.Parameter("split", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    made.__signature__ = own.replace(parameters=[split, *kept])  # type: ignore[attr-defined]
    return made


def _mnist1d(
    split: Split,
    *,
    protocol: Protocol = "permuted_labels",
    ways: int | None = None,
    shots: int = 5,
    queries: int = 15,
) -> Episodes:
    return tasks.mnist1d(protocol, split, ways=ways, shots=shots, queries=queries)  # type: ignore[arg-type]


def _image_folders(
    split: Split,
    *,
    root: str,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    size: int | None = None,
    gray: bool | None = None,
    rotations: bool = False,
    seed: int = 0,
) -> Episodes:
    """Omniglot, mini-ImageNet or class folders; only training classes are turned."""
    turned = rotations and split == "train"
    images = tasks.image_folders(root, split, size=size, gray=gray, rotations=turned, seed=seed)
    return tasks.few_shot(images, ways, shots, queries)


FAMILIES: dict[str, Callable[..., Dataset[Tasks]]] = {
    "sinusoid": _generated(tasks.sinusoid),
    "harmonic": _generated(tasks.harmonic),
    "linear": _generated(tasks.linear),
    "logistic": _generated(tasks.logistic),
    "mnist1d": _mnist1d,
    "image_folders": _image_folders,
}
"""By name: from a split to its tasks. A function of one's own, FILE.py:FUNCTION, has the same form."""
