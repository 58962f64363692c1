"""Which execution a learner runs in, and what its parts cannot have there."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import nn

from metanudge.errors import MetanudgeError, SettingsError
from metanudge.estimators import Estimator
from metanudge.execution import Execution, InPlace, Vectorized
from metanudge.oracle import BatchNorm, CudaGraphs, Programs, device_of
from metanudge.selection import Selection
from metanudge.sharding import is_sharded
from metanudge.solvers.loop import Solver
from metanudge.tree import accumulator
from metanudge.types import LossFunction, Need, Role
from metanudge.warned import warn


def check_needs(missing: Set[Need], *parts: Estimator | Solver) -> None:
    """Raise a SettingsError for an estimator or solver that needs what is missing."""
    for part in parts:
        for need in (need for need in Need if need in part.needs & missing):  # what rules most out comes first
            raise SettingsError(f"{type(part).__name__} cannot run here: {need.reason}. {need.cure}")


LARGE = 10_000_000
"""Adapted parameters above which "auto" takes the live module: a stack holds that many a task and node."""


class Running(NamedTuple):
    """How a learner is asked to run: arguments of ``MetaLearner``."""

    execution: str
    chunk_size: int | None = None
    microbatch: int | None = None
    compile: bool = False
    cuda_graphs: bool = False


def choose_execution(
    how: Running,
    model: nn.Module,
    losses: Mapping[Role, LossFunction],
    norm: BatchNorm,
    selection: Selection,
    solver: Solver,
    estimator: Estimator,
) -> Execution:
    """Make the execution asked for; "auto" is documented at ``MetaLearner``.

    Raises:
        SettingsError: An unknown name, or a setting of the other execution.

    Warns:
        UserWarning: A torch optimizer is to step parameters in bfloat16 or float16.
    """
    if how.execution not in ("auto", "vectorized", "in_place"):
        raise SettingsError(f'execution must be "auto", "vectorized" or "in_place", got {how.execution!r}')
    parameters = dict(model.named_parameters())
    adapted = [parameters[name] for name in selection.adapted]
    kinds = {parameter.dtype for parameter in adapted}
    if Need.LIVE_MODULE in solver.needs and any(accumulator(kind) != kind for kind in kinds):
        warn(
            f"{type(solver).__name__} steps the parameters themselves, of which some are narrower than float32: small "
            "steps are lost to rounding, and estimates can be far off. Keep the adapted parameters in "
            "float32 and put torch.autocast around backward, or take mn.Nesterov or mn.Adam, whose iterates are in "
            "float32 in place",
            UserWarning,
        )
    reason = _reason(how, model, adapted, solver, estimator) if how.execution == "auto" else None
    if how.execution == "vectorized" or (how.execution == "auto" and reason is None):
        _check_vectorized(how, model, kinds)
        return Vectorized(model, losses, norm, how.chunk_size, Programs() if how.compile else None)
    _check_in_place(how, model, norm, f' ("auto" chose it {reason})' if reason else "")
    return InPlace(model, losses, norm, how.microbatch, CudaGraphs() if how.cuda_graphs else None)


def _reason(
    how: Running, model: nn.Module, adapted: list[nn.Parameter], solver: Solver, estimator: Estimator
) -> str | None:
    """Why "auto" goes in place, if it does."""
    optimized = any(isinstance(module, torch._dynamo.OptimizedModule) for module in model.modules())
    compiled = Need.DOUBLE_BACKWARD not in estimator.needs and any(map(_compiled, model.modules()))
    reasons = {
        f"for {type(solver).__name__}": Need.LIVE_MODULE in solver.needs,
        "as the model is compiled": optimized or compiled,
        "as the model is sharded": is_sharded(model),
        "for a layer that vmap cannot run": any(map(_not_for_vmap, model.modules())),
        "for its size": sum(parameter.numel() for parameter in adapted) > LARGE,
        "for microbatch": how.microbatch is not None,
        "for cuda_graphs": how.cuda_graphs,
        "for float16": any(parameter.dtype is torch.float16 for parameter in adapted),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _check_vectorized(how: Running, model: nn.Module, kinds: Set[torch.dtype]) -> None:
    """Raise a SettingsError for what a stack cannot have."""
    if torch.float16 in kinds:
        raise SettingsError(
            "in float16 the squares of gradients vanish, and the vectorized execution computes in the precision of "
            "the parameters; give execution='in_place', which sums in float32, or bfloat16 or float32 parameters, "
            "which estimators that differentiate twice need in any case"
        )
    if any(isinstance(one, nn.Embedding | nn.EmbeddingBag) and one.max_norm is not None for one in model.modules()):
        raise SettingsError(
            "an embedding with max_norm writes to its weights in a forward pass, which tasks of a stack share; "
            "give execution='in_place' or 'auto', or leave out max_norm"
        )
    if how.microbatch is not None:
        raise SettingsError("microbatch belongs to the in-place execution; in a stack, chunk_size limits the tasks")
    if how.cuda_graphs:
        raise SettingsError(
            "cuda_graphs belongs to the in-place execution, whose passes wait for Python; for a stack there is "
            "compile=True"
        )


def _check_in_place(how: Running, model: nn.Module, norm: BatchNorm, why: str) -> None:
    """Raise a SettingsError for what the live module cannot have; ``why`` it is there."""
    if how.compile:
        raise SettingsError(
            f"compile belongs to the vectorized execution; in place{why}, the model is used as it is: leave compile "
            "out, or give MetaLearner torch.compile(model)"
        )
    if how.microbatch is not None and norm.policy in ("transductive", "support"):
        raise SettingsError(
            f'batch_norm="{norm.policy}" normalises by a whole batch, of which microbatch={how.microbatch} shows a '
            'piece at a time; give batch_norm="frozen", leave microbatch out, or take GroupNorm or LayerNorm'
        )
    if how.cuda_graphs:
        check_recordable(model, norm)
    made_in_inference = next((name for name, leaf in model.named_parameters() if leaf.is_inference()), None)
    if made_in_inference is not None:
        raise SettingsError(
            f"the parameter {made_in_inference} was made within torch.inference_mode(), and cannot be stepped in "
            "place; make the model outside of it"
        )


def check_recordable(model: nn.Module, norm: BatchNorm) -> None:
    """Raise a SettingsError where no CUDA graph of a pass can be recorded."""
    kind = device_of(model).type
    if kind != "cuda":
        raise SettingsError(
            f"cuda_graphs=True records what a CUDA GPU does, and the model is on the device {kind!r}; move it first, "
            "model.to('cuda'), or leave cuda_graphs out"
        )
    if is_sharded(model):
        raise SettingsError("cuda_graphs=True cannot record what FSDP2 does between ranks; leave it out")
    if norm.policy == "support":
        raise SettingsError(
            'batch_norm="support" evaluates both sets in one pass, between which random generators are seeded, and '
            'cuda_graphs=True cannot record that; give "transductive" or "frozen", or leave cuda_graphs out'
        )


def check_hooks(model: nn.Module, error: type[MetanudgeError]) -> None:
    """Raise an error for backward hooks on modules, which a stack, whose gradients are not theirs, runs past."""
    hooked = next((name for name, module in model.named_modules() if _hooked(module)), None)
    if hooked is not None:
        where = f"the module {hooked}" if hooked else "the model"
        raise error(
            f"{where} has a backward hook, which would not run in the vectorized execution; give the MetaLearner "
            'execution="in_place", where it runs in every inner step, or remove it (handle.remove())'
        )


def _compiled(module: nn.Module) -> bool:
    """By module.compile(), or with a forward method that is; a stack runs these uncompiled."""
    forward: Any = getattr(module, "forward", None)
    compiled = hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
    return compiled or getattr(module, "_compiled_call_impl", None) is not None


def _hooked(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _not_for_vmap(module: nn.Module) -> bool:
    """Recurrent layers, and modules with backward hooks; what writes to its weights in a forward pass.

    Which are embeddings with a largest norm, or with sparse gradients, and spectral normalisation in train mode.
    """
    if _hooked(module) or (type(module).__name__ == "_SpectralNorm" and module.training):
        return True
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return (module.sparse and module.weight.requires_grad) or module.max_norm is not None
    return isinstance(module, nn.RNNBase)
