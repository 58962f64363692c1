"""The user's own functions, by name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from metanudge.errors import SettingsError
from metanudge.learner import MetaLearner
from metanudge.settings import nearest
from metanudge.types import Tasks

FORM = "a function without arguments that returns (learner, tasks) or (learner, tasks, optimizer)"


class Loaded(NamedTuple):
    """What the user's function returned."""

    learner: MetaLearner
    tasks: Tasks | Iterable[Tasks]
    optimizer: torch.optim.Optimizer | None


def load_learner(target: str) -> Loaded:
    """Call the function that ``target`` names.

    Args:
        target: "package.module:function" or "path/to/file.py:function".

    Raises:
        SettingsError: No such file, module or function, or one that returns something else. What the user's own code
            raises passes through.
    """
    return _unpacked(load_function(target, FORM)(), target)


def load_function(target: str, form: str = "one of your own") -> Callable[..., Any]:
    """The function that ``target``, "package.module:function" or "path/to/file.py:function", names.

    Raises:
        SettingsError: No such file, module or function.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise SettingsError(
            f"expected FILE.py:FUNCTION or package.module:FUNCTION, got {target!r}; the function is {form}"
        )
    module = _module(place)
    function: object = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if _is_of(value, module) and not key.startswith("_")]
        raise SettingsError(f"{place} has no function {name!r}; {nearest(name, own)}. It should be {form}")
    return function


def _is_of(value: object, module: ModuleType) -> bool:
    """Whether it is a function or class that the module defines, and does not import."""
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _module(place: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if not place.endswith(".py"):
        try:
            found = importlib.util.find_spec(place)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise SettingsError(f"there is no module {place!r}, neither installed nor below {here}")
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise SettingsError(f"there is no file {place}, seen from the current folder, {Path.cwd()}")
    return _of_file(path.resolve(), path.stat().st_mtime_ns)


@cache
def _of_file(path: Path, _changed: int) -> Any:
    """The module in a file, run once however many of its functions are asked for."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes can be pickled
    spec.loader.exec_module(module)
    return module


def _unpacked(found: Any, target: str) -> Loaded:
    parts = tuple(found) if isinstance(found, tuple) and not isinstance(found, Tasks) else (found,)
    if len(parts) not in (2, 3) or not isinstance(parts[0], MetaLearner):
        raise SettingsError(f"{target} should be {FORM}, but it returned {type(found).__name__}")
    optimizer = parts[2] if len(parts) == 3 else None
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingsError(f"{target} returned {type(optimizer).__name__} where a torch optimizer belongs")
    return Loaded(parts[0], parts[1], optimizer)
