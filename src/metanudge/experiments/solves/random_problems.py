"""Small convex problems of every condition, with their exact meta-gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


def steep_loss(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Steep softplus pieces in the margins, flat on one side, and a linear loss: ``targets`` holds both factors.

    By the logistic function: torch's softplus jumps where it turns linear.
    """
    steepness, slope = batch.targets.unbind(-1)
    margins = model(batch.inputs).squeeze(-1)
    pieces: Tensor = (slope * margins - F.logsigmoid(-steepness * margins)).mean()
    return pieces


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


class Draw:
    """Numbers from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        """Between ``low`` and ``high``."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def whole(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def log_uniform(self, low: float, high: float) -> float:
        """Uniform in the logarithm."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def start(self, model: nn.Module, scale: float) -> None:
        """Put ``model`` at an initialisation of up to twice ``scale``."""
        with torch.no_grad():
            for parameter in model.parameters():
                drawn = self.normal(parameter.numel()).reshape(parameter.shape)
                parameter.copy_(drawn * self.uniform(0, 2) * scale)


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
    draw = Draw(seed)
    for index in range(number):
        name, loss = list(LOSSES.items())[index % len(LOSSES)]
        features, examples = draw.whole(2, 11), draw.whole(5, 39)
        weight, size, count = draw.log_uniform(*prox), draw.log_uniform(*scale), draw.whole(*steps)
        drawn = logistic(1, features=features, shots=examples, queries=examples, seed=1000 * seed + index)
        shape = (1, examples, 1) if name == "ridge" else (1, examples)
        tasks = mn.Tasks(*(mn.Batch(size * batch.inputs, batch.targets.reshape(shape)) for batch in drawn))
        model = logistic_model(features)
        draw.start(model, 1 / size)
        largest = float(torch.linalg.matrix_norm(tasks.support.inputs[0], 2)) ** 2 / examples
        condition = 1 + largest * (2.0 if name == "ridge" else 0.25) / weight
        yield RandomProblem(model, loss, tasks, weight, count, _exact(model, loss, tasks, weight), condition)


def steep_problems(number: int, seed: int) -> Iterator[RandomProblem]:
    """Draw problems whose curvature comes and goes within a step: softplus pieces as support, a linear query loss.

    1 to 6 features, 2 to 11 examples, steepness 5 to 200, prox 0.1 to 10, 1 to 40 steps.
    """
    draw = Draw(seed)
    for _ in range(number):
        features, examples = draw.whole(1, 6), draw.whole(2, 11)
        weight, count = draw.log_uniform(0.1, 10.0), draw.whole(1, 40)
        steepness = torch.full((1, examples), draw.log_uniform(5.0, 200.0), dtype=torch.float64)
        inputs, zero = draw.normal(2, 1, examples, features), torch.zeros_like(steepness)
        tasks = mn.Tasks(
            mn.Batch(inputs[0], torch.stack([steepness, zero], -1)),
            mn.Batch(inputs[1], torch.stack([zero, draw.normal(1, examples)], -1)),
        )
        model = logistic_model(features)
        draw.start(model, 1.0)
        largest = float(torch.linalg.matrix_norm(inputs[0, 0], 2)) ** 2 / examples
        condition = 1 + largest * float(steepness[0, 0]) ** 2 / 4 / weight
        exact = _exact(model, steep_loss, tasks, weight)
        yield RandomProblem(model, steep_loss, tasks, weight, count, exact, condition)


def _exact(model: nn.Module, loss: LossFunction, tasks: mn.Tasks, prox: float) -> Tensor:
    objective = ExactMetaObjective(model, loss, tasks, prox)
    return objective.gradient(objective.theta0)
