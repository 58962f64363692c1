"""Whether what is given has an axis of tasks, told by its shapes and those that were seen before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metanudge.batching import as_stacks, ordinary
from metanudge.checks import check_not_empty, check_stack, leaves, wrapped
from metanudge.errors import TasksError
from metanudge.minibatches import as_minibatches
from metanudge.types import Batch, Tasks
from metanudge.warned import warn

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
"""Of the tensors of one task's support set, inputs and targets."""


def shapes_of(stacks: Iterable[Tasks]) -> set[Shapes]:
    """Of the tasks of checked stacks; those of minibatches are not looked at."""
    supports = [stack.support for stack in stacks if as_minibatches(stack.support) is None]
    return {tuple(tuple(leaf.shape[1:]) for leaf in leaves(support)) for support in supports}


def checked_shapes(model: nn.Module, stacks: list[Tasks], seen: set[Shapes]) -> set[Shapes]:
    """``shapes_of`` checked stacks, once it is clear that their leading axes are those of tasks.

    Raises:
        TasksError: Tasks of new shapes look like stacks of those seen.

    Warns:
        UserWarning: They look like the examples of one task.
    """
    found = shapes_of(stacks)
    for shapes in found - seen:
        _refuse_stack(shapes, seen, "every task of a list, or of a stack, is one task", CUT)
    if not found <= seen:
        _tell_lone_examples(model, [stack for stack in stacks if not shapes_of([stack]) <= seen])
    return found


def _tell_lone_examples(model: nn.Module, stacks: list[Tasks]) -> None:
    """Warn of tasks of one example each, without an axis of examples.

    A regression's examples without a task axis look like that, and many models take them without a word.
    """
    layer = next((one for one in model.modules() if isinstance(one, nn.Linear | nn.modules.conv._ConvNd)), None)
    for stack in stacks:
        inputs = [batch.inputs for batch in stack]
        if all(isinstance(one, Tensor) and one.is_floating_point() and _is_one(one.shape[1:], layer) for one in inputs):
            number, *shape = stack.support.inputs.shape
            warn(
                f"each of {number} tasks has one input of shape {tuple(shape)} without an axis of examples, as the "
                f"model's first layer, {type(layer).__name__}, takes a single example: is the task axis missing? "
                "A stack of tasks is [tasks, examples, ...]; one task goes in a list, [mn.Tasks(...)]",
                UserWarning,
            )


def _is_one(shape: torch.Size, layer: nn.Linear | nn.modules.conv._ConvNd | None) -> bool:
    """Whether it is that of a single example of the layer's inputs."""
    if layer is None:
        return False
    if isinstance(layer, nn.Linear):
        return tuple(shape) == (layer.in_features,)
    return len(shape) == len(layer.kernel_size) + 1 and shape[0] == layer.in_channels


def alone(support: Batch, device: torch.device, seen: set[Shapes]) -> list[Tasks]:
    """The stack of a task whose query does not matter.

    Args:
        support: Of the task.
        device: Of the model.
        seen: Of the tasks that were learnt from or evaluated.

    Raises:
        TasksError: No batch, or a stack: but for a leading axis, its tensors have the shapes of a task seen.
    """
    source = as_minibatches(support)
    if source is not None:
        return as_stacks([Tasks(support, source[0])], device)[0]
    if not isinstance(support, Batch):
        raise TasksError(
            f"adapt expects mn.Batch(inputs, targets) of one task, got {type(support).__name__}"
            + (f"; {ONE}" if isinstance(support, Tasks) else wrapped(support))
        )
    check_not_empty(Tasks(support, support))
    _refuse_stack(tuple(tuple(leaf.shape) for leaf in leaves(support)), seen, "adapt takes one task", ONE)
    stack = tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, support)
    one = Tasks(stack, stack)
    check_stack(one, device)
    return [ordinary(one)]


CUT = "give stacks one by one, or their tasks: stack.unstack()"
ONE = "give the support set of one task, task.support; out of a stack, tasks.unstack()[i].support"


def _refuse_stack(shapes: Shapes, seen: set[Shapes], wanted: str, cure: str) -> None:
    """Many models take a stack of tasks without a word, as one task of more examples.

    As many would take a task of sequences where single vectors were seen, so all sizes have to fit, the number of
    examples as well: a task refused wrongly has no way in.
    """
    known = {tuple(map(len, one)) for one in seen}
    stacked = all(shapes) and len({shape[0] for shape in shapes}) == 1
    if stacked and tuple(map(len, shapes)) not in known and tuple(shape[1:] for shape in shapes) in seen:
        told = " and ".join(map(str, shapes))
        raise TasksError(
            f"{wanted}, but this looks like a stack of {shapes[0][0]}: its tensors have the shapes {told}, "
            f"those of a task this learner has seen with an axis more; {cure}"
        )
