"""Checks of settings, with the words a user can act on."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn, optim

from metanudge.errors import SettingsError


def nearest(given: str, known: Iterable[str]) -> str:
    """What a mistyped name may have meant, and all that there is."""
    names = list(known)
    plain = {name.lower().replace("_", ""): name for name in names}  # "GradientDescent" is "gradient_descent"
    close = difflib.get_close_matches(given.lower().replace("_", ""), plain, 1, 0.5)
    told = f'did you mean "{plain[close[0]]}"? There' if close else "there"
    return f"{told} is {', '.join(names) or 'nothing'}"


def shown(**settings: object) -> str:
    """Those that are not None, to go on with after other settings."""
    return "".join(f", {name}={value!r}" for name, value in settings.items() if value is not None)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check(name: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise a SettingsError unless it ``holds``; with a cure for numbers of numpy's, which no file could hold."""
    if holds(value):
        return
    cure = ""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0 and holds(value.item()):
        cure = f", a {type(value).__name__}: take its .item(), a number of Python's"
    raise SettingsError(f"{name} must be {wanted}, got {value!r}{cure}")


def check_number(number: int, name: str, least: int = 0) -> None:
    """Raise a SettingsError unless ``number`` is a whole number of at least ``least``."""
    _check(name, number, lambda v: _is_whole(v) and v >= least, f"a whole number of at least {least}")


def check_steps(steps: int, name: str = "steps") -> None:
    """Raise a SettingsError unless ``steps`` is a whole number >= 1."""
    check_number(steps, name, least=1)


def check_seed(seed: int) -> None:
    """Raise a SettingsError unless ``seed`` is a whole number >= 0."""
    check_number(seed, "seed")


def check_folder(out: Path) -> None:
    """Raise a SettingsError where nothing could be written into ``out``; made, with its parents, it need not be yet."""
    nearest = next(place for place in (out, *out.parents) if place.exists())
    if not nearest.is_dir():
        raise SettingsError(f"results go into a folder, but {nearest} is a file; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SettingsError(f"results cannot go into {out}: {nearest} may not be written to; choose another place")


def check_not_negative(**settings: float) -> None:
    """Raise a SettingsError unless every setting is a finite number >= 0."""
    for name, value in settings.items():
        _check(name, value, lambda v: _is_real(v) and v >= 0, "a finite number of at least 0")


def check_sizes(**settings: int | None) -> None:
    """Raise a SettingsError unless every setting is a whole number >= 1, or None."""
    for name, number in settings.items():
        whole = "a whole number of at least 1 or None"
        _check(name, number, lambda v: v is None or (_is_whole(v) and v >= 1), whole)


FOR_GOOD = {
    "model",
    "loss",
    "query_loss",
    "batch_norm",
    "chunk_size",
    "microbatch",
    "compile",
    "cuda_graphs",
    "process_group",
    "losses",
    "norm",
    "automatic",
    "ranks",
}
"""What a learner is made with, or is made of it, that cannot be set later."""
AT_ANY_TIME = ("prox", "solver", "estimator", "adapt_only", "sharpness_radius", "warm_start")
"""Those that can."""


def check_may_be_set(name: str, value: object, own: bool) -> None:
    """Raise a SettingsError for what a learner that is made would not look at again, or is no attribute of its own."""
    if name in FOR_GOOD or (name == "execution" and isinstance(value, str)):
        raise SettingsError(
            f"a learner keeps the {name} that it was made with; make a new MetaLearner with the other one. "
            f"What may be set is {', '.join(AT_ANY_TIME[:-1])} and {AT_ANY_TIME[-1]}"
        )
    if not own:
        raise SettingsError(f"a learner has no {name} that could be set; {nearest(name, AT_ANY_TIME)}")


def check_flag(**settings: bool) -> None:
    """Raise a SettingsError unless every setting is True or False."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise SettingsError(f"{name} must be True or False, got {value!r}")


def check_positive(**settings: float) -> None:
    """Raise a SettingsError unless every setting is a finite number > 0."""
    for name, value in settings.items():
        _check(name, value, lambda v: _is_real(v) and v > 0, "a finite number above 0")


def check_fraction(**settings: float) -> None:
    """Raise a SettingsError unless every setting is a number in [0, 1)."""
    for name, value in settings.items():
        _check(name, value, lambda v: _is_real(v) and 0 <= v < 1, "a number in [0, 1)")


def check_model(model: object) -> None:
    """Raise a SettingsError for what is no module, or holds one that mixes the ranks' gradients within inner solves."""
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                raise SettingsError(
                    f"the model is wrapped by {kind.__name__}, which averages gradients over processes (or devices) "
                    "within every inner solve, and so mixes their tasks. Give the plain module (ddp.module) and "
                    "process_group=torch.distributed.group.WORLD, and every rank its own tasks; or shard it by FSDP2, "
                    "torch.distributed.fsdp.fully_shard (docs/large_models.md)"
                )


_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")  # the second is slow to import


def check_losses(**losses: object) -> None:
    """Raise a SettingsError unless every one is a function of a model and a batch, or None."""
    for argument, function in losses.items():
        if function is not None:
            check_function(argument, function, "loss(model, batch) -> scalar tensor")


def check_parts(
    solver: object,
    solvers: Mapping[str, type[Any]],
    estimator: object,
    estimators: Mapping[str, type[Any]],
    warm_start: object,
) -> None:
    """Raise a SettingsError for what cannot be these parts of a learner; ``solvers`` and ``estimators`` are known."""
    asked = ("steps", "needs", "differentiable", "plan", "init", "step", "settle", "point", "finished")
    if isinstance(solver, optim.Optimizer):
        name = type(solver).__name__
        raise SettingsError(
            f"solver must be an object such as mn.Nesterov(steps=16), got a torch.optim optimizer; give "
            f"mn.TorchOptimizer(lambda p: torch.optim.{name}(p, ...), steps=5), which makes one for every solve"
        )
    check_part("solver", solver, asked, "mn.Nesterov(steps=16)", solvers)
    check_part("estimator", estimator, ("needs", "__call__"), "mn.FOBMAML()", estimators)
    if warm_start is not None:
        check_part("warm_start", warm_start, ("get", "put", "state_dict"), "mn.WarmStart(), or None")


def check_function(argument: str, given: object, form: str) -> None:
    """Raise a SettingsError for what is no function of a model and a batch: a name, a class, a module of torch.nn."""
    of_torch = getattr(given, "__module__", None) in ("torch.nn.functional", "torch._C._nn")
    if not callable(given) or isinstance(given, type | nn.modules.loss._Loss) or of_torch:
        hint = "; write one that calls the model and then the loss" if callable(given) else ""
        raise SettingsError(f"{argument} must be a function {form}, got {given!r}{hint}")
    try:
        signature = inspect.signature(given, follow_wrapped=False)
    except Exception:  # written in C, or annotated by what is not there: it cannot be told
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise SettingsError(
            f"{argument} must be a function {form}, called with those two, got one of {signature}"
        ) from error


def check_part(
    argument: str,
    given: object,
    attributes: tuple[str, ...],
    example: str,
    known: Mapping[str, type[Any]] | None = None,
) -> None:
    """Raise a SettingsError for a name (told from those ``known``), a class, or an object that lacks what is asked."""
    if isinstance(given, str):
        kind = (known or {}).get(given.lower())
        cure = "" if kind is None else f"; give {_call(kind)}"
        raise SettingsError(f"{argument} must be an object such as {example}, got {given!r}{cure}")
    if isinstance(given, type):
        raise SettingsError(f"{argument} must be an object such as {example}, got the class {given.__name__}")
    lacking = [name for name in attributes if not hasattr(given, name)]
    if lacking:
        raise SettingsError(
            f"{argument} must be an object such as {example}, got {briefly(given)}, without {lacking[0]!r}"
        )


def _call(kind: type[Any]) -> str:
    """How to make one, with dots for what has to be given."""
    needed = any(p.default is p.empty for p in inspect.signature(kind).parameters.values())
    return f"mn.{kind.__name__}({'...' if needed else ''})"


def briefly(given: object) -> str:
    """On one line: itself where it is short, and otherwise what it is."""
    told = repr(given)
    return told if len(told) <= 80 and "\n" not in told else f"a {type(given).__name__}"
