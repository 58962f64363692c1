"""What "auto" does where vmap turns out not to run a model: the same call again, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from metanudge.errors import UnmappableError


class GoesInPlace(Protocol):
    """A learner that may change its execution."""

    def _goes_in_place(self, error: UnmappableError) -> bool: ...


L = TypeVar("L", bound=GoesInPlace)
P = ParamSpec("P")
R = TypeVar("R")


def falls_back(method: Callable[Concatenate[L, P], R]) -> Callable[Concatenate[L, P], R]:
    """Call a learner's method again where that raised an ``UnmappableError`` and the learner has gone in place since.

    What raises has changed nothing, so that nothing is done twice.
    """

    @wraps(method)
    def called(learner: L, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(learner, *args, **kwargs)
        except UnmappableError as error:
            if not learner._goes_in_place(error):
                raise
        return method(learner, *args, **kwargs)

    return called
