"""Adapting without a meta-gradient: one task's own module, and a metric along the way."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import FunctionType
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metanudge.batching import as_stacks, ordinary
from metanudge.checks import check_not_empty, check_stack, leaves, wrapped
from metanudge.energy import InnerProblem
from metanudge.errors import SettingsError, TasksError
from metanudge.minibatches import as_minibatches
from metanudge.oracle import BatchNorm
from metanudge.oracle.common import device_of, leaves_of, scalar_loss
from metanudge.oracle.written import Written
from metanudge.random_state import forked
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


def looked_at(model: nn.Module, stacks: list[Tasks], seen: set[Shapes]) -> set[Shapes]:
    """``shapes_of`` checked stacks; warns where tasks of new shapes look like the examples of one.

    A regression's examples without a task axis are a stack of tasks, each an example without an axis of its own, which
    many models take without a word.

    Raises:
        TasksError: Tasks of new shapes look like stacks of those seen.
    """
    for shapes in shapes_of(stacks):
        _refuse_stack(shapes, seen, "every task of a list, or of a stack, is one task", CUT)
    layer = next((one for one in model.modules() if isinstance(one, nn.Linear | nn.modules.conv._ConvNd)), None)
    for stack in stacks:
        if layer is None or shapes_of([stack]) <= seen:  # of minibatches there are none
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
    """Raise a SettingsError for a sharded model."""
    if is_sharded(model):
        raise SettingsError(
            "adapt copies the model, which FSDP2 does not allow; use evaluate, or adapt the model unsharded, from "
            "the initialisation that torch.distributed.checkpoint saves"
        )


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


def adapted_copy(
    model: nn.Module,
    named: dict[str, Tensor],
    norm: BatchNorm,
    loss: LossFunction,
    support: Batch,
    share_frozen: bool,
) -> nn.Module:
    """A copy of the model at the adapted parameters ``named``; it may share the memory of frozen ones with it.

    Raises:
        SettingsError: ``copy.deepcopy`` does not take the model, or the copy goes on calling it.
    """
    frozen = [parameter for parameter in model.parameters() if share_frozen and not parameter.requires_grad]
    try:
        adapted = copy.deepcopy(model, memo={id(parameter): _same_memory(parameter) for parameter in frozen})
    except RuntimeError as error:
        raise SettingsError(
            "adapt copies the model by copy.deepcopy, which cannot copy this one, as where a module holds a tensor "
            "with a graph: what was computed from parameters, such as the weight that the old "
            "torch.nn.utils.weight_norm leaves (take torch.nn.utils.parametrizations.weight_norm) or a cached "
            f"activation. PyTorch said: {error}"
        ) from error
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in named:
                parameter.copy_(named[name])
        source = as_minibatches(support)
        batch = support if source is None else source[0]
        _check_apart(model, adapted, loss, batch)
    adapted.zero_grad(set_to_none=True)
    norm.settle(adapted, loss, batch)
    return adapted


def _same_memory(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of its own, which ``.to()`` and ``requires_grad_()`` may change, in the memory of a frozen one."""
    if type(parameter) is not nn.Parameter:  # as of a quantised base, which has more to it than numbers
        return parameter
    own = nn.Parameter(parameter.detach(), requires_grad=False)
    vars(own).update(vars(parameter))
    return own


def _check_apart(model: nn.Module, adapted: nn.Module, loss: LossFunction, batch: Batch) -> None:
    """Raise a SettingsError for a copy that goes on calling the model.

    ``deepcopy`` does not copy functions, nor what is in their closures, as that of a method which was compiled or
    replaced. Where a module holds one, the copy's loss tells: it must not lead to the model's parameters.
    """
    if not any(_holds_closures(module) for module in model.modules()):
        return
    both = (model, adapted)
    written = [Written.over(one) for one in both]
    buffers = [(buffer, buffer.clone()) for one in both for buffer in one.buffers()]
    try:
        with torch.enable_grad(), forked(device_of(model)):
            value = scalar_loss(loss, adapted, batch)
    finally:
        for one in written:
            one.undo()
        for buffer, before in buffers:
            buffer.copy_(before)
    own: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    name = next((own[leaf] for leaf in leaves_of(value) if leaf in own), None)
    if name is not None:
        raise SettingsError(
            f"adapt copies the model, but the copy goes on using {name} of the original: a module holds a function "
            "that is bound to it, such as a forward method that was replaced, or a method that was compiled. Compile "
            "modules, by torch.compile(module) or module.compile(), and replace methods by a subclass or a "
            "types.MethodType that takes all from self; or use evaluate, which makes no copy"
        )


def _holds_closures(module: nn.Module) -> bool:
    """Whether an attribute is, or may hold, a function with what it is bound to."""
    plain = (nn.Module, Tensor, type, str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size)
    held = (one for name, one in vars(module).items() if name != "_compiled_call_impl")  # which copies are without
    callables = (one for one in held if callable(one) and not isinstance(one, plain))
    return any(not isinstance(one, FunctionType) or one.__closure__ or one.__kwdefaults__ for one in callables)


def losses_of(problem: InnerProblem, phi: Params) -> tuple[float, float]:
    """The support loss of one task at the initialisation and at ``phi``; of minibatches, of the first one."""
    loss, theta = problem.losses.loss, problem.initial
    return float(loss(Role.SUPPORT, theta)), float(loss(Role.SUPPORT, phi))


def curves(problem: InnerProblem, solver: Solver, function: LossFunction) -> Tensor:
    """``function`` of the query sets of one problem's tasks after every step, ``[T, K + 1]``."""
    found: list[Tensor] = []

    def observe(_step: int, phi: Params) -> None:
        found.append(problem.losses.value(function, Role.QUERY, phi).reshape(-1).cpu())

    solve(solver, problem.energy(), problem.initial, observe)
    found += [found[-1]] * (solver.steps + 1 - len(found))
    return torch.stack(found, dim=1).double()
