"""Adapting without a meta-gradient: one task's own module, and a metric along the way."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metanudge.batching import as_stacks, ordinary
from metanudge.checks import check_stack, leaves, wrapped
from metanudge.energy import InnerProblem
from metanudge.errors import SettingsError, TasksError
from metanudge.minibatches import as_minibatches
from metanudge.oracle import BatchNorm
from metanudge.sharding import is_sharded
from metanudge.solvers import Solver
from metanudge.solvers.loop import solve
from metanudge.types import Batch, LossFunction, Params, Role, Tasks
from metanudge.warned import warn

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
"""Of the tensors of one task's support set, inputs and targets."""


def shapes_of(stacks: Iterable[Tasks]) -> set[Shapes]:
    """Of the tasks of checked stacks; those of minibatches are not looked at."""
    supports = [stack.support for stack in stacks if as_minibatches(stack.support) is None]
    return {tuple(tuple(leaf.shape[1:]) for leaf in leaves(support)) for support in supports}


def looked_at(model: nn.Module, stacks: Iterable[Tasks], seen: set[Shapes]) -> set[Shapes]:
    """``shapes_of`` checked stacks; warns where tasks of new shapes look like the examples of one.

    A regression's examples without a task axis are a stack of tasks, each an example without an axis of its own, which
    many models take without a word.
    """
    stacks = list(stacks)
    layer = next((one for one in model.modules() if isinstance(one, nn.Linear | nn.modules.conv._ConvNd)), None)
    for stack in stacks:
        if layer is None or as_minibatches(stack.support) is not None or shapes_of([stack]) <= seen:
            continue
        inputs = [batch.inputs for batch in stack]
        if all(isinstance(one, Tensor) and one.is_floating_point() and _is_one(one.shape[1:], layer) for one in inputs):
            number, *shape = stack.support.inputs.shape
            warn(
                f"each of {number} tasks has one input of shape {tuple(shape)} without an axis of examples, as the "
                f"model's first layer, {type(layer).__name__}, takes a single example: is the task axis missing? "
                "A stack of tasks is [tasks, examples, ...]; one task goes in a list, [mn.Tasks(...)]",
                UserWarning,
            )
    return shapes_of(stacks)


def _is_one(shape: torch.Size, layer: nn.Linear | nn.modules.conv._ConvNd) -> bool:
    """Whether it is that of a single example of the layer's inputs."""
    if isinstance(layer, nn.Linear):
        return tuple(shape) == (layer.in_features,)
    return len(shape) == len(layer.kernel_size) + 1 and shape[0] == layer.in_channels


def check_copyable(model: nn.Module) -> None:
    """Raise a SettingsError for a sharded model, and for one whose copy would go on calling the model.

    ``deepcopy`` copies methods with what they are bound to, but functions, and what is in their closures, not at all.
    """
    own = set(map(id, model.modules()))
    for name, module in model.named_modules():
        held = next((key for key, one in vars(module).items() if isinstance(one, Tensor) and one.grad_fn), None)
        if held is not None:
            raise SettingsError(
                f"adapt copies the model, and {f'the module {name}' if name else 'it'} holds {held}, a tensor with a "
                "graph, which can not be copied: keep it as a number (.detach()), or not at all. The old "
                "torch.nn.utils.weight_norm leaves one; take torch.nn.utils.parametrizations.weight_norm"
            )
        function = vars(module).get("forward")
        if isinstance(function, MethodType | partial):  # which are copied, but for the function in them
            function = function.__func__ if isinstance(function, MethodType) else function.func
        if isinstance(function, FunctionType) and _reaches(function, own):
            raise SettingsError(
                f"adapt copies the model, and {f'the module {name}' if name else 'it'} has a function in the place of "
                f"its forward method ({function.__qualname__}) that is bound to the module itself: the copy would go "
                "on calling the original. Compile by torch.compile(module) or module.compile(), replace the method by "
                "a subclass or a types.MethodType; or use evaluate, which makes no copy"
            )
    if is_sharded(model):
        raise SettingsError(
            "adapt copies the model, which FSDP2 does not allow; use evaluate, or adapt the model unsharded, from "
            "the initialisation that torch.distributed.checkpoint saves"
        )


def _reaches(function: object, own: set[int], deep: int = 6) -> bool:
    """Whether modules known by ``own`` are within reach of a function: bound, or in closures and what these hold."""
    if isinstance(function, MethodType):
        return id(function.__self__) in own or _reaches(function.__func__, own, deep)
    if not isinstance(function, FunctionType):
        return id(function) in own
    within = [*(function.__defaults__ or ())]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a cell that is empty yet
            within.append(cell.cell_contents)
    return deep > 0 and any(_reaches(one, own, deep - 1) for one in within)


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
    _refuse_stack(support, seen)
    stack = tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, support)
    one = Tasks(stack, stack)
    check_stack(one, device)
    return [ordinary(one)]


ONE = "give the support set of one task, task.support; out of a stack, tasks.unstack()[i].support"


def _refuse_stack(support: Batch, seen: set[Shapes]) -> None:
    """Many models take a stack of tasks without a word, as one task of more examples.

    As many would take a task of sequences where single vectors were seen, so all sizes have to fit, the number of
    examples as well: a task refused wrongly has no way in.
    """
    shapes = tuple(tuple(leaf.shape) for leaf in leaves(support))
    known = {tuple(map(len, one)) for one in seen}
    stacked = all(shapes) and len({shape[0] for shape in shapes}) == 1
    if stacked and tuple(map(len, shapes)) not in known and tuple(shape[1:] for shape in shapes) in seen:
        told = " and ".join(map(str, shapes))
        raise TasksError(
            f"adapt takes one task, but this looks like a stack of {shapes[0][0]}: its tensors have the shapes {told}, "
            f"those of a task this learner has seen with an axis more; {ONE}"
        )


def adapted_copy(
    model: nn.Module,
    named: dict[str, Tensor],
    norm: BatchNorm,
    loss: LossFunction,
    support: Batch,
    share_frozen: bool,
) -> nn.Module:
    """A copy of the model at the adapted parameters ``named``; it may share the memory of frozen ones with it."""
    frozen = [parameter for parameter in model.parameters() if share_frozen and not parameter.requires_grad]
    adapted = copy.deepcopy(model, memo={id(parameter): _same_memory(parameter) for parameter in frozen})
    adapted.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in named:
                parameter.copy_(named[name])
    source = as_minibatches(support)
    norm.settle(adapted, loss, support if source is None else source[0])
    return adapted


def _same_memory(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of its own, which ``.to()`` and ``requires_grad_()`` may change, in the memory of a frozen one."""
    if type(parameter) is not nn.Parameter:  # as of a quantised base, which has more to it than numbers
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def losses_of(problem: InnerProblem, phi: Params) -> tuple[float, float]:
    """The support loss of one task at the initialisation and at ``phi``; of minibatches, of the first one."""
    loss, theta = problem.losses.loss, problem.losses.spread(problem.theta)
    return float(loss(Role.SUPPORT, theta)), float(loss(Role.SUPPORT, phi))


def curves(problem: InnerProblem, solver: Solver, function: LossFunction) -> Tensor:
    """``function`` of the query sets of one problem's tasks after every step, ``[T, K + 1]``."""
    found: list[Tensor] = []

    def observe(_step: int, phi: Params) -> None:
        found.append(problem.losses.value(function, Role.QUERY, phi).reshape(-1).cpu())

    solve(solver, problem.energy(), problem.losses.spread(problem.theta), observe)
    found += [found[-1]] * (solver.steps + 1 - len(found))
    return torch.stack(found, dim=1).double()
