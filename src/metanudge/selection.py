"""Which parameters the inner problem adapts, which are shared between tasks, which are frozen."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Set
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from metanudge.errors import SettingsError
from metanudge.settings import check_function

AdaptOnly = str | Iterable[str] | Callable[[str, nn.Parameter], bool]
"""Names of parameters or modules, patterns (``"*.bias"``), or a predicate ``(name, parameter) -> bool``."""
SHOWN = 20
"""Names in an error, at most."""


def listed(adapt_only: AdaptOnly | None) -> AdaptOnly | None:
    """The same, to be used twice and written down: of any iterable a tuple, of a set, whose order is chance, sorted."""
    if isinstance(adapt_only, str) or callable(adapt_only) or not isinstance(adapt_only, Iterable):
        return adapt_only
    return tuple(sorted(adapt_only, key=str) if isinstance(adapt_only, Set) else adapt_only)


class Selection(NamedTuple):
    """Names of trainable parameters, tied ones once.

    Attributes:
        adapted: Solved for in the inner problem; their initialisation is the meta-parameter.
        shared: Trainable, the same in every task; meta-parameters that the inner problem does not move.
    """

    adapted: tuple[str, ...]
    shared: tuple[str, ...]


def select_parameters(model: nn.Module, adapt_only: AdaptOnly | None) -> Selection:
    """Split the trainable parameters of ``model``; frozen ones (``requires_grad=False``) belong to neither part.

    Raises:
        SettingsError: Nothing is trainable, a trainable parameter has a hook, is complex, without shape or on a device
            that is not supported, a buffer asks for a gradient, a pattern matches no parameter, or nothing is left to
            adapt.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check_trainable(model, trainable)
    if adapt_only is None:
        return Selection(tuple(trainable), ())
    if callable(adapt_only) and not isinstance(adapt_only, type | nn.Module):
        check_function("adapt_only", adapt_only, "(name, parameter) -> bool")
        chosen = {name for name, parameter in trainable.items() if adapt_only(name, parameter)}
        asked = "the predicate given as adapt_only"
    else:
        patterns = _patterns(adapt_only)
        chosen, asked = _matched(model, trainable, patterns), f"adapt_only={patterns!r}"
    adapted = tuple(name for name in trainable if name in chosen)
    if not adapted:
        raise SettingsError(f"{asked} leaves no trainable parameter to adapt; trainable are {_some(list(trainable))}")
    return Selection(adapted, tuple(name for name in trainable if name not in chosen))


def _check_trainable(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> None:
    """Raise a SettingsError where there is nothing to learn, or what could not be."""
    if not trainable:
        raise SettingsError(
            "the model has no trainable parameter, so there is nothing to adapt; "
            "give at least one parameter requires_grad=True"
        )
    for name, buffer in model.named_buffers():
        if buffer.requires_grad:
            raise SettingsError(
                f"the buffer {name} asks for a gradient, which it would get none of here; make it a parameter "
                "(torch.nn.Parameter) to have it learned, or give it requires_grad_(False)"
            )
    for name, parameter in trainable.items():
        if parameter.device.type not in ("cpu", "cuda"):
            raise SettingsError(
                f"the parameter {name} is on {parameter.device}; this library runs on CPUs and CUDA devices (with "
                'random numbers and float64 sums that others lack): model.to("cpu")'
            )
        if isinstance(parameter, nn.UninitializedParameter):
            raise SettingsError(
                f"the parameter {name} of a lazy module has no shape yet; call the model on a batch once, then make "
                "the MetaLearner"
            )
        if parameter.is_complex():
            raise SettingsError(
                f"the parameter {name} is complex, and norms and inner products here are real; hold its real and "
                "imaginary parts as a real parameter (torch.view_as_real)"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise SettingsError(
                f"the parameter {name} has a hook (register_hook, register_post_accumulate_grad_hook), which would act "
                "on every gradient within the inner solves, or on none; remove it (handle.remove()), and change .grad "
                "after backward"
            )


def _matched(model: nn.Module, trainable: Mapping[str, nn.Parameter], patterns: tuple[str, ...]) -> set[str]:
    """Which of the trainable parameters go by one of the patterns.

    Raises:
        SettingsError: A pattern that no parameter, trainable or not, goes by.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)  # a tied parameter answers to each of its names
    every = [name for same in names.values() for name in same]
    for pattern in patterns:
        if any(_matches(name, pattern) for name in every):
            continue
        modules = [name for name, _ in model.named_modules() if name]
        close = difflib.get_close_matches(pattern, [*modules, *every], 1, 0.5)
        close = [f"*{pattern}*"] if any(pattern in name for name in trainable) else close
        meant = f'did you mean "{close[0]}"? Its' if close else "its"
        raise SettingsError(
            f"adapt_only={pattern!r} matches no parameter or module of the model; {meant} trainable parameters are "
            f"{_some(list(trainable))}"
        )
    return {
        first
        for first, parameter in trainable.items()
        if any(_matches(name, pattern) for name in names[id(parameter)] for pattern in patterns)
    }


def _some(names: list[str]) -> str:
    """The first of them, as many as can be read at a glance."""
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _matches(name: str, pattern: str) -> bool:
    """Whether the parameter, or a module that holds it, goes by ``pattern``."""
    return any(fnmatchcase(one, form) for one in (name, uncompiled(name)) for form in (pattern, pattern + ".*"))


def uncompiled(name: str) -> str:
    """A parameter's name without what ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _patterns(adapt_only: object) -> tuple[str, ...]:
    patterns = (adapt_only,) if isinstance(adapt_only, str) else adapt_only
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        hint = "; give the module's name, such as 'head'" if isinstance(adapt_only, nn.Module) else ""
        raise SettingsError(
            "adapt_only must be a name or pattern, several of them, or a predicate (name, parameter) -> bool, "
            f"got {type(adapt_only).__name__}{hint}"
        )
    return tuple(patterns)
