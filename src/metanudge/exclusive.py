"""One use of models at a time: the random state, and what a model is lent out with, are the process's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = RLock()


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Let other threads that call what is exclusive wait."""

    @wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK:
            return function(*args, **kwargs)

    return waiting
