"""Copies of the user's model and tasks, and measurements on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metanudge.batching import as_stacks, single
from metanudge.checks import not_finite
from metanudge.errors import NonFiniteError, NonFiniteWarning, SettingsError, UnsolvedWarning
from metanudge.estimators.base import Estimator
from metanudge.learner import MetaLearner
from metanudge.oracle.common import device_of
from metanudge.random_state import forked, seed_generators
from metanudge.solvers import Solver
from metanudge.sources import groups
from metanudge.types import MetaStep, Role, Tasks


class Bench:
    """Copies of model and tasks, and what runs on them."""

    def __init__(self, learner: MetaLearner, tasks: list[Tasks]) -> None:
        self.learner, self.tasks = learner, tasks
        try:
            self.model = copy.deepcopy(learner.model)
        except Exception as error:
            raise SettingsError(
                f"check works on a copy of the model, and {type(learner.model).__name__} cannot be copied: {error}"
            ) from error
        self.model.zero_grad(set_to_none=True)
        self.double = self._in_double()

    @property
    def everyone(self) -> tuple[int, ...]:
        """The places of all tasks."""
        return tuple(range(len(self.tasks)))

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return device_of(self.model)

    def bad(self) -> dict[int, list[str]]:
        """Tasks with NaN or infinite numbers in their data, and where."""
        return not_finite(*as_stacks(self.tasks, self.device), missing=False)

    def _in_double(self) -> tuple[nn.Module, list[Tasks]] | None:
        """Model and tasks in float64, if both losses take them."""
        tasks = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, self.tasks)
        try:
            model = copy.deepcopy(self.model).double()
            tried = copy.deepcopy(model)  # a forward pass may write buffers
            with quiet(self.device), torch.enable_grad():
                for task in tasks:
                    for role, batch in zip(Role, task, strict=True):
                        self.learner.losses[role](tried, batch).backward()  # type: ignore[no-untyped-call]
        except Exception:  # whatever it is, float64 is not for this model
            return None
        return model, tasks

    def make(
        self, model: nn.Module, solver: Solver, prox: float, estimator: Estimator, execution: str | None = None
    ) -> MetaLearner:
        """The user's learner with something changed; not compiled: it takes few steps, and may differentiate twice."""
        old = self.learner
        return MetaLearner(
            model,
            old.losses[Role.SUPPORT],
            query_loss=old.losses[Role.QUERY],
            prox=prox,
            sharpness_radius=old.sharpness_radius,
            solver=solver,
            estimator=estimator,
            adapt_only=old.adapt_only,
            execution=cast(Any, execution or old.execution.name),
            chunk_size=getattr(old.execution, "chunk_size", None),
            microbatch=getattr(old.execution, "microbatch", None) if execution is None else None,
            batch_norm=old.norm.policy,
        )


def measured(learner: MetaLearner, tasks: list[Tasks]) -> tuple[Tensor, MetaStep]:
    """The meta-gradient as one float64 vector, with the same random state every time; ``.grad`` is cleared."""
    parameters = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    with quiet(parameters[0].device):
        step = learner.backward(tasks)
    leaves = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    gradient = torch.cat([leaf.detach().reshape(-1).double().cpu() for leaf in leaves])
    for parameter in parameters:
        parameter.grad = None
    return gradient, step


def alone(learner: MetaLearner, task: Tasks) -> bool:
    """Whether a task is kept: its solve does not diverge, and what it gives is finite."""
    try:
        measured(learner, [task])
    except NonFiniteError:
        return False
    return True


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """A random state of its own, and no warnings of what the table tells anyway."""
    with warnings.catch_warnings(), forked(device):
        warnings.simplefilter("ignore", UnsolvedWarning)
        warnings.simplefilter("ignore", NonFiniteWarning)
        seed_generators(0, device)
        yield


def first(learner: MetaLearner, tasks: Tasks | Iterable[Tasks], number: int) -> list[Tasks]:
    """The first tasks, single."""
    group = next(iter(groups(tasks, number)), [])
    stacks, places = as_stacks(group, device_of(learner.model))
    ordered = dict(zip(places, (task for stack in stacks for task in single(stack)), strict=True))
    return [ordered[place] for place in sorted(ordered)][:number]
