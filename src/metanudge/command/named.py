"""From the tables of a settings file to calls: names are looked up, keys and types checked, before anything is made."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from metanudge.command.loading import load_function
from metanudge.errors import SettingsError
from metanudge.settings import nearest

T = TypeVar("T")
KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def choose(name: Any, registry: Mapping[str, T], where: str) -> T | Callable[..., Any]:
    """What ``registry`` has under ``name``, or the user's own function FILE.py:FUNCTION or package.module:FUNCTION.

    Raises:
        SettingsError: Neither.
    """
    if not isinstance(name, str):
        raise SettingsError(f"{where} must be a name, got {name!r}")
    if ":" in name:
        return load_function(name)
    if name not in registry:
        raise SettingsError(f"{where} knows no {name!r}; {nearest(name, registry)}, or FILE.py:FUNCTION")
    return registry[name]


def part(table: Any, registry: Mapping[str, Callable[..., T]], where: str, given: Sequence[str] = ()) -> partial[T]:
    """The call that a table with a ``name`` and settings describes, still to be made.

    Args:
        table: As read from TOML.
        registry: By name, what can be called.
        where: The table's own name, for errors.
        given: Arguments that the caller will give, and a file cannot.

    Raises:
        SettingsError: An unknown name or key, a missing one, a value of another type.
    """
    if not isinstance(table, dict) or "name" not in table:
        raise SettingsError(f"[{where}] needs a name; there is {', '.join(registry)}, or FILE.py:FUNCTION")
    settings = {key: value for key, value in table.items() if key != "name"}
    called = choose(table["name"], registry, f"[{where}]")
    return partial(called, **arguments(called, settings, f"[{where}] ", given))


def arguments(
    called: Callable[..., Any], settings: Mapping[str, Any], where: str, given: Sequence[str] = ()
) -> dict[str, Any]:
    """``settings`` as arguments of ``called``, checked against its signature.

    Raises:
        SettingsError: An unknown key, a missing one, a value of another type.
    """
    parameters = inspect.signature(called).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    positional = [p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL or p.kind is p.VAR_KEYWORD]
    known = {name: p for name, p in parameters.items() if name not in given and name not in positional}
    for key in settings:
        if key not in known and (not free or key in given):
            raise SettingsError(f'{where}has no setting "{key}"; {nearest(key, known)}')
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in settings:
            raise SettingsError(f'{where}needs "{name}"')
    hints = _hints(called)
    return {key: conform(value, hints.get(key, Any), f"{where}{key}") for key, value in settings.items()}


def _hints(called: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except (NameError, TypeError):  # names that only a type checker sees: the call itself will tell
        return {}


def conform(value: Any, hint: Any, where: str) -> Any:
    """``value``, as read from TOML, in the type ``hint``: lists become tuples, whole numbers floats, names functions.

    Raises:
        SettingsError: It does not fit.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, inside, where)
    if origin is Literal:
        if value in inside:
            return value
        raise SettingsError(f"{where} cannot be {value!r}; {nearest(str(value), map(str, inside))}")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is Callable and isinstance(value, str):
        return load_function(value)
    if origin in (tuple, list, Sequence, Iterable):
        return _several(value, inside, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return hint(**arguments(hint, value, f"{where}: "))
    if hint in KINDS:
        fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return value if fits else _refuse(value, KINDS[hint], where)
    if hint is types.NoneType:
        return _refuse(value, "left out", where)
    if isinstance(hint, type) and not isinstance(value, hint):
        _refuse(value, hint.__name__, where)
    return value


def _any_of(value: Any, hints: Sequence[Any], where: str) -> Any:
    failures = []
    for hint in hints:
        try:
            return conform(value, hint, where)
        except SettingsError as error:
            failures.append(error)
    raise failures[0]


def _several(value: Any, inside: Sequence[Any], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        _refuse(value, "a list", where)
    each = inside[0] if inside else Any
    if len(inside) > 1 and inside[1] is not ...:
        if len(inside) != len(value):
            _refuse(value, f"a list of {len(inside)}", where)
        return tuple(conform(item, hint, where) for item, hint in zip(value, inside, strict=True))
    return tuple(conform(item, each, where) for item in value)


def _refuse(value: Any, wanted: str, where: str) -> NoReturn:
    raise SettingsError(f"{where} must be {wanted}, got {value!r}")
