"""What the study of stationarity runs (see stationarity.py): meta-descents, watched by the exact meta-objective."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map

import metanudge as mn
from metanudge.estimators.base import Estimator
from metanudge.experiments.synthetic.exact_logistic import meta_gradients
from metanudge.tasks import logistic_loss, logistic_model

MakeOptimizer = Callable[[Iterable[nn.Parameter], float], Optimizer]
"""An optimizer of given step size."""


class Problem(NamedTuple):
    """The meta-problem all runs share.

    Attributes:
        tasks: The stack of all T tasks: logistic, heterogeneous, with wrong labels, so that no query gradient vanishes.
        prox: λ.
    """

    tasks: mn.Tasks
    prox: float

    @property
    def size(self) -> tuple[int, int]:
        """Tasks T and parameters d."""
        number, _, features = self.tasks.query.inputs.shape
        return number, features

    def learner(self, estimator: Estimator, inner_steps: int, start: Tensor | None = None) -> mn.MetaLearner:
        """The library as its users have it; θ = ``start``, or 0."""
        model = logistic_model(self.size[1])
        if start is not None:
            with torch.no_grad():
                model.weight.copy_(start)
        solver = mn.Nesterov(inner_steps)
        return mn.MetaLearner(model, logistic_loss, prox=self.prox, solver=solver, estimator=estimator)

    def gradient_norms(self, thetas: Sequence[Tensor]) -> Tensor:
        """||∇F||, exactly, at every one of ``thetas``."""
        norms: Tensor = meta_gradients(self.tasks, torch.stack(list(thetas)), self.prox).norm(dim=-1)
        return norms


class Point(NamedTuple):
    """Where a meta-descent is: the gradient evaluations it has taken per task, and θ."""

    evaluations: float
    theta: Tensor


def descend(
    learner: mn.MetaLearner, optimizer: Optimizer, batches: Iterable[mn.Tasks], scheduler: LambdaLR | None = None
) -> Iterator[Point]:
    """Take a meta-step on every batch; yield the start and the point after every step."""
    parameters = list(learner.model.parameters())
    evaluations = 0.0
    yield Point(evaluations, nn.utils.parameters_to_vector(parameters).detach())
    for batch in batches:
        optimizer.zero_grad()
        step = learner.backward(batch)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        evaluations += step.gradient_evaluations / len(batch.query.targets)
        yield Point(evaluations, nn.utils.parameters_to_vector(parameters).detach())


def full_batch(problem: Problem, estimator: Estimator, inner_steps: int, step_size: float) -> Iterator[Point]:
    """Plain meta-descent from 0 on all tasks, without end."""
    learner = problem.learner(estimator, inner_steps)
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=step_size)
    return descend(learner, optimizer, itertools.repeat(problem.tasks))


class Curve(NamedTuple):
    """||∇F|| against the gradient evaluations per task spent so far."""

    evaluations: list[float]
    norms: list[float]


def curve_of(problem: Problem, points: Iterable[Point]) -> Curve:
    """Judge a trajectory exactly."""
    evaluations, thetas = zip(*points, strict=True)
    return Curve(list(evaluations), problem.gradient_norms(thetas).tolist())


class Noise(NamedTuple):
    """The stochastic variant: what all its runs of one seed share.

    Attributes:
        start: θ, far away.
        minibatches: Tasks of every meta-step.
    """

    start: Tensor
    minibatches: list[mn.Tasks]

    @classmethod
    def draw(cls, problem: Problem, distance: float, size: int, steps: int, seed: int) -> Noise:
        """A random direction to start in, and ``size`` different tasks a step."""
        generator = Generator().manual_seed(seed)
        start = torch.randn(problem.size[1], generator=generator, dtype=torch.float64)

        def minibatch() -> mn.Tasks:
            chosen = torch.randperm(problem.size[0], generator=generator)[:size]
            found: mn.Tasks = tree_map(lambda leaf: leaf[chosen], problem.tasks)
            return found

        return cls(distance * start / start.norm(), [minibatch() for _ in range(steps)])


def noisy_norms(problem: Problem, make: MakeOptimizer, noise: Noise, inner_steps: int, step_size: float) -> Tensor:
    """||∇F|| at the start and after every meta-step on minibatches; the step size falls linearly to zero."""
    learner = problem.learner(mn.FOBMAML(nudge="full"), inner_steps, noise.start)
    optimizer = make(learner.model.parameters(), step_size)
    total = len(noise.minibatches)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / total)
    points = descend(learner, optimizer, noise.minibatches, scheduler)
    return problem.gradient_norms([point.theta for point in points])
