"""One use of models at a time: the random state, and what a model is lent out with, are the process's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = RLock()


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Let other threads that call what is exclusive wait; run it outside inference mode."""

    @wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK, torch.inference_mode(False):  # a decorator of torch would be where warnings seem to come from
            return function(*args, **kwargs)

    return waiting
