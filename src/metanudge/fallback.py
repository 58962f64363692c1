"""What "auto" does where vmap turns out not to run a model: the same call again, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch

from metanudge import advice
from metanudge.choosing import Running, choose_execution
from metanudge.errors import SettingsError, UnmappableError
from metanudge.execution import Execution, Vectorized
from metanudge.selection import select_parameters
from metanudge.warned import warn

if TYPE_CHECKING:
    from metanudge.learner import MetaLearner  # whose methods are made with this

P = ParamSpec("P")
R = TypeVar("R")


def falls_back(method: Callable[Concatenate[MetaLearner, P], R]) -> Callable[Concatenate[MetaLearner, P], R]:
    """Call a learner's method again, in place, where it raised an ``UnmappableError`` and "auto" may choose that.

    What raises has changed nothing but the random state, which is put back, so that a training that goes on later, in
    another process, is the same one. Where it raises in place too, the learner stays as it was; and where it was given
    a function, which is no loss of the learner's: a metric does not decide how a training runs.
    """

    @wraps(method)
    def called(learner: MetaLearner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        drawn = torch.default_generator.get_state()
        try:
            return method(learner, *args, **kwargs)
        except UnmappableError as error:
            before, other = learner.execution, _in_place(learner)
            if other is None:
                raise
            reason = str(error)  # not the error, which holds all that was alive
        torch.default_generator.set_state(drawn)
        learner.execution = other
        try:
            found = method(learner, *args, **kwargs)
            if any(callable(one) and one not in learner.losses.values() for one in args):
                learner.execution = before
            else:
                warn(advice.in_place(reason), UserWarning)
        except BaseException:
            learner.execution = before
            raise
        return found

    return called


def _in_place(learner: MetaLearner) -> Execution | None:
    """The other execution, where a learner may change over to it: not where settings, or ranks, forbid."""
    before = learner.execution
    if not learner.automatic or not isinstance(before, Vectorized) or learner.ranks.size > 1:
        return None
    selection = select_parameters(learner.model, learner.adapt_only)
    try:
        found = choose_execution(
            Running("in_place", compile=before.programs is not None),
            learner.model,
            learner.losses,
            learner.norm,
            selection,
            learner.solver,
            learner.estimator,
        )
        learner.check_can_run(selection, found)
    except SettingsError:
        return None
    return found
