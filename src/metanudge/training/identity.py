"""What tells one training from another: settings, the losses' code, the model it began with."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from metanudge.errors import SettingsError
from metanudge.learner import MetaLearner
from metanudge.types import Role
from metanudge.warned import warn

ROUNDED = ("execution", "compile", "cuda_graphs", "chunk_size", "microbatch", "processes")
"""Settings that change a step by round-off alone, and with dropout in train mode by other draws: a training that ran
out of memory may go on with others."""
FEW = 1000
"""Numbers of a tensor that tell one model from another."""


def settings_of(learner: MetaLearner, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a step depends on, to the last bit, as far as it can be written down; of functions their names."""
    adapt_only, execution = learner.adapt_only, learner.execution
    found: dict[str, Any] = {
        "prox": learner.prox,
        "sharpness_radius": learner.sharpness_radius,
        "solver": _described(learner.solver),
        "estimator": _described(learner.estimator),
        "batch_norm": learner.norm.policy,
        "loss": qualified_name(learner.losses[Role.SUPPORT]),
        "query_loss": qualified_name(learner.losses[Role.QUERY]),
        "execution": execution.name,
        "compile": learner.compile,
        "cuda_graphs": learner.cuda_graphs,
        "optimizer": type(optimizer).__name__,
    }
    for size in ("chunk_size", "microbatch"):
        if hasattr(execution, size):
            found[size] = getattr(execution, size)
    if callable(adapt_only):
        found["adapt_only"] = qualified_name(adapt_only)
    else:
        found["adapt_only"] = [adapt_only] if isinstance(adapt_only, str) else adapt_only and list(adapt_only)
    for name, value in getattr(optimizer, "defaults", {}).items():
        if name != "lr" and (number := _numbers(value)) is not None:
            found[f"optimizer's {name}"] = number
    # a scheduler moves "lr" and leaves the first one in "initial_lr"
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups if "lr" in group]
    return found | {"optimizer's lr": rates[0] if len(set(rates)) == 1 else rates}


def settings_of_scheduler(scheduler: LRScheduler | None, name: str = "scheduler") -> dict[str, Any]:
    """Its type, and the numbers it was made with, as far as it keeps them under their names; none for no scheduler."""
    if scheduler is None:
        return {}
    found: dict[str, Any] = {name: type(scheduler).__name__}
    for argument in inspect.signature(type(scheduler)).parameters:
        if argument == "last_epoch":  # where it begins; the attribute says how far it is
            continue
        value = getattr(scheduler, argument, getattr(scheduler, f"_{argument}", None))
        if isinstance(value, Counter):
            value = sorted(value.elements())
        if argument == "schedulers" and isinstance(value, list | tuple):
            for place, part in enumerate(value):
                found |= settings_of_scheduler(part, f"{name} {place}")
        elif (number := _numbers(value)) is not None:
            found[f"{name}'s {argument}"] = number
    return found


def qualified_name(function: Any) -> str:
    """Of a function, as it is known in its file; of a partial call, that of its function; else of the object's type."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def code_of(function: Any) -> str:
    """A digest of a function's source as Python reads it, without texts on itself; "" where there is none to be had."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        read = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, ValueError, SyntaxError):  # of an interpreter, of C, or a lambda within a call
        return ""
    for node in ast.walk(read):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.unparse(read).encode()).hexdigest()[:12]


def _described(part: Any) -> str:
    """A solver or estimator without its functions, whose names and addresses say nothing."""
    name = type(part).__name__
    if dataclasses.is_dataclass(part):
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items() if not callable(value))})"
    return name if " at 0x" in repr(part) else repr(part)


def _numbers(value: Any) -> float | list[float] | None:
    """A number or several; None for anything else, flags included."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, tuple | list) and all(isinstance(one, int | float) for one in value):
        return [float(one) for one in value]
    return None


def check_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a SettingsError where a setting that decides what is computed is known of both and not the same."""
    for name, value in before.items():
        if name not in ROUNDED and name in now and now[name] != value:
            raise SettingsError(
                f"{path} is of a training with {name} = {value}, this one has {now[name]}; give the same, another "
                "folder, or resume=False to begin anew"
            )


def tell_rounded(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn of settings known of both that are not the same, where it is of those that ``ROUNDED`` names."""
    if found := [
        f"{name} = {now[name]} where it had {before[name]}"
        for name in ROUNDED
        if name in before and name in now and now[name] != before[name]
    ]:
        warn(
            f"the training of {path} goes on with {', '.join(found)}: the same mathematics, but not bit for bit what "
            "it would have been, and with dropout in train mode other draws",
            UserWarning,
        )


def tell_rewritten(path: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Warn of functions known of both that are not written alike."""
    for name, digest in now.items():
        if digest and before.get(name, "") not in ("", digest):
            warn(
                f"{name} was written differently when the training of {path} took its last step, which it goes on from "
                "as it is: what was done is of the former one. Begin anew with resume=False, or in another folder",
                UserWarning,
            )


def tell_replaced(path: Path, done: int) -> None:
    """Warn of a model that did not begin as that of the training it is to go on with."""
    warn(
        f"{path} is of a training that began with other parameters than this model has: they are replaced by those "
        f"after its {done} steps. Another training, with another seed say, needs a folder of its own, or resume=False",
        UserWarning,
    )


def told_apart(state: dict[str, Any]) -> str:
    """A digest of a model: of the first numbers of each tensor, as large ones would take long."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            some = value.detach().flatten()[:FEW].cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
