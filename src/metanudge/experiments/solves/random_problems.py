"""Small convex problems of every condition, with their exact meta-gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import metanudge as mn
from metanudge.diagnostics import ExactMetaObjective
from metanudge.estimators.base import Estimator
from metanudge.tasks import logistic, logistic_loss, logistic_model
from metanudge.types import LossFunction


def quartic_loss(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Logistic, with a quartic term whose curvature changes a lot along the way."""
    quartic: Tensor = 0.1 * model(batch.inputs).pow(4).mean()
    return logistic_loss(model, batch) + quartic


LOSSES: dict[str, LossFunction] = {
    "logistic": logistic_loss,
    "ridge": mn.metrics.squared_error,
    "quartic": quartic_loss,
}


@dataclass(frozen=True)
class RandomProblem:
    """One task of a linear model.

    Attributes:
        model: At the initialisation.
        exact: ∇F there.
        condition: (L + λ) / λ of the support loss at the initialisation.
    """

    model: nn.Module
    loss: LossFunction
    tasks: mn.Tasks
    prox: float
    steps: int
    exact: Tensor
    condition: float

    def measure(self, estimator: Estimator) -> tuple[float, float, float]:
        """Error and norm of an estimate, and the bound that goes with it (relative to that norm)."""
        self.model.zero_grad()
        learner = mn.MetaLearner(
            self.model, self.loss, prox=self.prox, solver=mn.Nesterov(self.steps), estimator=estimator
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mn.UnsolvedWarning)
            bound = learner.backward(self.tasks).error_bound
        found = torch.cat([_gradient(parameter).reshape(-1) for parameter in self.model.parameters()])
        return float((found - self.exact).norm()), float(found.norm()), bound


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def random_problems(
    number: int,
    seed: int,
    prox: tuple[float, float] = (0.1, 10.0),
    scale: tuple[float, float] = (0.3, 3.0),
    steps: tuple[int, int] = (4, 40),
) -> Iterator[RandomProblem]:
    """Draw problems: 2 to 11 features, 5 to 39 examples, the three losses in turn.

    Args:
        number: How many.
        seed: Decides them all.
        prox: Range of λ, log-uniform.
        scale: Range of the size of the inputs, log-uniform; the curvature goes with its square.
        steps: Range of the solver's steps, uniform.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def log_uniform(low: float, high: float) -> float:
        return math.exp(uniform(math.log(low), math.log(high)))

    for index in range(number):
        name, loss = list(LOSSES.items())[index % len(LOSSES)]
        features, examples = whole(2, 11), whole(5, 39)
        weight, size, count = log_uniform(*prox), log_uniform(*scale), whole(*steps)
        drawn = logistic(1, features=features, shots=examples, queries=examples, seed=1000 * seed + index)
        shape = (1, examples, 1) if name == "ridge" else (1, examples)
        tasks = mn.Tasks(*(mn.Batch(size * batch.inputs, batch.targets.reshape(shape)) for batch in drawn))
        model = logistic_model(features)
        with torch.no_grad():
            start = torch.randn(features, generator=generator, dtype=torch.float64)
            for parameter in model.parameters():
                parameter.copy_((start * uniform(0, 2) / size).reshape(parameter.shape))
        objective = ExactMetaObjective(model, loss, tasks, weight)
        exact = objective.gradient(objective.theta0)
        largest = float(torch.linalg.matrix_norm(tasks.support.inputs[0], 2)) ** 2 / examples
        condition = 1 + largest * (2.0 if name == "ridge" else 0.25) / weight
        yield RandomProblem(model, loss, tasks, weight, count, exact, condition)
