"""What tasks have to be: tensors in stacks, on the model's device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

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
        if leaf is None:
            raise TasksError(
                "tasks hold tensors or pytrees of tensors, but found None; where there is nothing, as targets that a "
                "loss does not need, give an empty tuple: mn.Batch(inputs, ())"
            )
        if not isinstance(leaf, Tensor):
            parts = "; for a support set in minibatches give mn.Minibatches" if isinstance(leaf, DataLoader) else ""
            if isinstance(leaf, str | bytes):
                parts = "; keep names beside the tasks, in a list of their order, or encode them as a tensor"
            if isinstance(leaf, int | float):
                parts = f"; make it a tensor: torch.tensor({leaf!r})"
            raise TasksError(
                f"tasks hold tensors or pytrees of tensors, but found {type(leaf).__name__}: {leaf!r:.80}{parts}"
            )
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
                f"the {part} of a stack cannot be mn.Minibatches, which is the support of one task: give such tasks "
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
    check_not_empty(tasks)
    return number


def check_not_empty(task: Tasks, whose: str = "") -> None:
    """Raise a TasksError for a task, or a stack of them, without examples; ``whose`` names one of a list."""
    for part, batch in zip(Tasks._fields, task, strict=True):
        for leaf in leaves(batch):
            if leaf.numel() == 0:
                raise TasksError(
                    f"a tensor of the {part} batch{whose} is empty, its shape is {tuple(leaf.shape)}; every task needs "
                    "at least one example"
                )


def check_axes(stack: Tasks) -> None:
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
                f'the model is on {device} but a tensor of the tasks on {tensor.device}; move it: tasks.to("{device}")'
            )


def largest(stacks: list[Tasks]) -> float:
    """The largest magnitude of a finite number in inputs and targets that are no whole numbers; 0 without any."""
    batches = [batch for stack in stacks for batch in stack if not as_minibatches(batch)]
    numbers = [leaf.detach().abs() for batch in batches for leaf in leaves(batch) if leaf.is_floating_point()]
    return max((float(leaf.where(leaf.isfinite(), 0).max()) for leaf in numbers if leaf.numel()), default=0.0)


def not_finite(stacks: list[Tasks], places: list[int], *, missing: bool = True) -> dict[int, list[str]]:
    """Of the tasks whose own tensors hold NaN or infinite numbers: place, and which tensors.

    Args:
        stacks: Of tasks.
        places: Theirs.
        missing: Whether targets of NaN count beside others that are none: they may be missing, or padding.
    """
    found: dict[int, list[str]] = {}
    first = 0
    for stack in stacks:
        number = 1 if as_minibatches(stack.support) else leaves(stack)[0].shape[0]
        for part, batch in zip(Tasks._fields, stack, strict=True):
            if as_minibatches(batch):
                continue
            for field, held in zip(Batch._fields, batch, strict=True):
                known = missing or field != "targets"
                wrong = [_wrong(leaf.reshape(number, -1), known) for leaf in leaves(held)]
                for row in torch.stack(wrong).any(0).nonzero().flatten().tolist() if wrong else []:
                    found.setdefault(places[first + row], []).append(f"{part} {field}")
        first += number
    return {place: found[place] for place in sorted(found)}


def _wrong(rows: Tensor, known: bool) -> Tensor:
    """Which rows hold what is not finite; where not all has to be ``known``, that all is NaN, or any infinite."""
    return ~rows.isfinite().all(1) if known else rows.isinf().any(1) | rows.isnan().all(1)
