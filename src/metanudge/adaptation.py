"""Adapting without a meta-gradient: one task's own module, and a metric along the way."""

from __future__ import annotations

import copy
import math
from types import FunctionType

import torch
from torch import Tensor, nn

from metanudge import advice
from metanudge.checks import not_finite
from metanudge.energy import InnerProblem
from metanudge.errors import NonFiniteError, SettingsError
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


def check_copyable(model: nn.Module) -> None:
    """Raise a SettingsError for a sharded model."""
    if is_sharded(model):
        raise SettingsError(
            "adapt copies the model, which FSDP2 does not allow; use evaluate, or adapt the model unsharded, from "
            "the initialisation that torch.distributed.checkpoint saves"
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


def check_adapted(before: float, after: float, finite: bool, stacks: list[Tasks], solver: Solver, prox: float) -> None:
    """Look at an adaptation to the one task of ``stacks``, whose query is its support.

    Args:
        before: Its support loss at the initialisation.
        after: And at the adapted parameters.
        finite: Whether these are finite.
        stacks: The task.
        solver: As of the learner.
        prox: As of the learner.

    Raises:
        NonFiniteError: It ended in NaN.

    Warns:
        UserWarning: It ended far above where it began.
    """
    if finite and math.isfinite(after):
        if after > before + 10 * abs(before):
            warn(
                f"adaptation raised the support loss from {before:.3g} to {after:.3g}: {advice.calmer(solver, prox)}",
                UserWarning,
            )
        return
    said = (
        "adaptation ended in non-finite parameters" if not finite else "adaptation ended in a non-finite support loss"
    )
    if math.isfinite(before):
        raise NonFiniteError(f"{said}; {advice.calmer(solver, prox)}")
    if bad := [where for where in not_finite(stacks, [0]).get(0, []) if where.startswith("support")]:
        raise NonFiniteError(
            f"{said}: there are NaN or infinite numbers in the {' and '.join(bad)}; mend these{advice.missing(bad)}"
        )
    raise NonFiniteError(f"{said}: {advice.NEVER_FINITE}")


def losses_of(problem: InnerProblem, phi: Params) -> tuple[float, float]:
    """The support loss of one task at the initialisation and at ``phi``; of minibatches, of the first one."""
    loss, theta = problem.losses.loss, problem.initial
    return float(loss(Role.SUPPORT, theta)), float(loss(Role.SUPPORT, phi))


def curves(problem: InnerProblem, solver: Solver, function: LossFunction) -> Tensor:
    """``function`` of the query sets of one problem's tasks after every step, ``[T, K + 1]``."""
    found: list[Tensor] = []

    def observe(_step: int, phi: Params) -> None:
        found.append(problem.losses.value(function, Role.QUERY, phi).reshape(-1))

    solve(solver, problem.energy(), problem.initial, observe)
    found += [found[-1]] * (solver.steps + 1 - len(found))
    return torch.stack(found, dim=1).cpu().double()
