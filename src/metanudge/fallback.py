"""What "auto" does where vmap turns out not to run a model: the same call again, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from metanudge.errors import UnmappableError
from metanudge.execution import Execution


class GoesInPlace(Protocol):
    """A learner that may change its execution."""

    execution: Execution

    def _in_place(self) -> Execution | None: ...

    def _went_in_place(self, reason: str, vectorized: Execution, *given: Any) -> None: ...


L = TypeVar("L", bound=GoesInPlace)
P = ParamSpec("P")
R = TypeVar("R")


def falls_back(method: Callable[Concatenate[L, P], R]) -> Callable[Concatenate[L, P], R]:
    """Call a learner's method again, in place, where it raised an ``UnmappableError`` and "auto" may choose that.

    What raises has changed nothing but the random state, which is put back, so that a training that goes on later, in
    another process, is the same one. Where it raises in place too, the learner stays as it was.
    """

    @wraps(method)
    def called(learner: L, /, *args: P.args, **kwargs: P.kwargs) -> R:
        drawn = torch.default_generator.get_state()
        try:
            return method(learner, *args, **kwargs)
        except UnmappableError as error:
            before, other = learner.execution, learner._in_place()
            if other is None:
                raise
            reason = str(error)  # not the error, which holds all that was alive
        torch.default_generator.set_state(drawn)
        learner.execution = other
        try:
            found = method(learner, *args, **kwargs)
            learner._went_in_place(reason, before, *args)
        except BaseException:
            learner.execution = before
            raise
        return found

    return called
