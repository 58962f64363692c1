"""Small convex problems of every condition, with their exact meta-gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metanudge as mn
from metanudge.diagnostics import ExactMetaObjective
from metanudge.energy import InnerProblem
from metanudge.estimators.base import Estimator, FreeSolve
from metanudge.estimators.certificate import Nudged, Parts
from metanudge.tasks import logistic, logistic_loss, logistic_model
from metanudge.types import LossFunction


def quartic_loss(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Logistic, with a quartic term whose curvature changes a lot along the way."""
    quartic: Tensor = 0.1 * model(batch.inputs).pow(4).mean()
    return logistic_loss(model, batch) + quartic


def pieces(bend: Callable[[Tensor], Tensor]) -> LossFunction:
    """A loss of the margins m with a piece that bends: a m²/2 + b m + c bend(k (m - e)), targets (a, b, c, k, e)."""

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        curvature, slope, weight, steepness, edge = batch.targets.unbind(-1)
        margins = model(batch.inputs).squeeze(-1)
        bent = weight * bend(steepness * (margins - edge))
        found: Tensor = (curvature / 2 * margins.square() + slope * margins + bent).mean()
        return found

    return loss


def softplus(z: Tensor) -> Tensor:
    """By the logistic function: torch's softplus jumps where it turns linear."""
    return -F.logsigmoid(-z)


def huber(z: Tensor) -> Tensor:
    """Huber's, quadratic up to 1."""
    return F.huber_loss(z, torch.zeros_like(z), reduction="none")


softplus_loss = pieces(softplus)
LOSSES: dict[str, LossFunction] = {
    "logistic": logistic_loss,
    "ridge": mn.metrics.squared_error,
    "quartic": quartic_loss,
}
FLAT_LOSSES = (pieces(F.relu), pieces(huber), softplus_loss)


@dataclass(frozen=True)
class Recording(mn.FOBMAML):
    """FO-B-MAML, which leaves what its bounds were made of in ``parts``."""

    parts: list[Parts] = field(default_factory=list, compare=False)

    def certificate(self, problem: InnerProblem, free: FreeSolve, nudged: Nudged) -> Parts:
        """Measure, and keep."""
        self.parts.append(super().certificate(problem, free, nudged))
        return self.parts[-1]


@dataclass(frozen=True)
class RandomProblem:
    """One task of a linear model.

    Attributes:
        model: At the initialisation.
        loss: Support loss, and query loss where ``query_loss`` is None.
        condition: (L + λ) / λ of the support loss at the initialisation, where it is steepest.
    """

    model: nn.Module
    loss: LossFunction
    tasks: mn.Tasks
    prox: float
    steps: int
    condition: float
    query_loss: LossFunction | None = None

    @cached_property
    def exact(self) -> Tensor:
        """∇F; its Newton's method ends with a step of at most 1e-13 of the solution.

        Raises:
            NonFiniteError: It did not get there.
        """
        objective = ExactMetaObjective(self.model, self.loss, self.tasks, self.prox, self.query_loss)
        return objective.gradient(objective.theta0)

    def measure(self, estimator: Estimator) -> tuple[float, float, float]:
        """Error and norm of an estimate, and the bound that goes with it (relative to that norm).

        Raises:
            NonFiniteError: The solve diverged, or there is no exact meta-gradient.
        """
        self.model.zero_grad()
        learner = mn.MetaLearner(
            self.model,
            self.loss,
            query_loss=self.query_loss,
            prox=self.prox,
            solver=mn.Nesterov(self.steps),
            estimator=estimator,
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
        condition = 1 + _largest(tasks.support.inputs[0]) * (2.0 if name == "ridge" else 0.25) / weight
        yield RandomProblem(model, loss, tasks, weight, count, condition)


def steep_problems(
    number: int,
    seed: int,
    steps: tuple[int, int] = (1, 40),
    steep_query: bool = False,
) -> Iterator[RandomProblem]:
    """Draw problems whose curvature comes and goes within a step: softplus pieces as support, a linear query loss.

    1 to 6 features, 2 to 11 examples, steepness 5 to 200, prox 0.1 to 10.

    Args:
        number: How many.
        seed: Decides them all.
        steps: Range of the solver's steps, uniform.
        steep_query: Whether the query loss has such pieces as well, of their own steepness.
    """
    draw = Draw(seed)
    for _ in range(number):
        features, examples = draw.whole(1, 6), draw.whole(2, 11)
        weight, count = draw.log_uniform(0.1, 10.0), draw.whole(*steps)
        steepness = draw.log_uniform(5.0, 200.0)
        inputs, slopes = draw.normal(2, 1, examples, features), draw.normal(1, examples)
        model = logistic_model(features)
        draw.start(model, 1.0)
        other = draw.log_uniform(5.0, 200.0) if steep_query else 0.0
        tasks = mn.Tasks(
            mn.Batch(inputs[0], _targets(slopes, 0.0, 0.0, 1.0, steepness, 0.0)),
            mn.Batch(inputs[1], _targets(slopes, 0.0, slopes, float(steep_query), other, 0.0)),
        )
        condition = 1 + _largest(inputs[0, 0]) * steepness**2 / 4 / weight
        yield RandomProblem(model, softplus_loss, tasks, weight, count, condition)


def flat_problems(number: int, seed: int) -> Iterator[RandomProblem]:
    """Draw problems made to break the bound: the query loss is flat where unfinished solves may overshoot.

    Steep softplus pieces as support, as in :func:`steep_problems`, of 1 to 3 features and 2 to 5 examples, in one to
    six steps; one to three hinges, Huber or logistic pieces in turn, of steepness 5 to 200, as query.
    """
    draw = Draw(seed)
    for index in range(number):
        features, examples, queries = draw.whole(1, 3), draw.whole(2, 5), draw.whole(1, 3)
        weight, count = draw.log_uniform(0.1, 10.0), draw.whole(1, 6)
        steepness, other = draw.log_uniform(5.0, 200.0), draw.log_uniform(5.0, 200.0)
        inputs = draw.normal(1, examples, features), draw.normal(1, queries, features)
        model = logistic_model(features)
        draw.start(model, 1.0)
        zero = torch.zeros(1, examples, dtype=torch.float64)
        edges = draw.normal(1, queries)
        tasks = mn.Tasks(
            mn.Batch(inputs[0], _targets(zero, 0.0, 0.0, 1.0, steepness, 0.0)),
            mn.Batch(inputs[1], _targets(edges, 0.0, 0.0, 1.0, other, edges)),
        )
        condition = 1 + _largest(inputs[0][0]) * steepness**2 / 4 / weight
        query = FLAT_LOSSES[index % len(FLAT_LOSSES)]
        yield RandomProblem(model, softplus_loss, tasks, weight, count, condition, query)


def gentle_problem(
    stiff: float, weight: float, steepness: float, edge: float, start: float, steps: int
) -> RandomProblem:
    """Make stiff w₁² / 2 - w₂ + weight softplus(steepness (w₂ - edge)) / steepness; query w₂, λ = 1, from (start, 0).

    The solution is at w₂ = 1 - weight σ(steepness (w₂ - edge)), where the piece bends, if ``edge`` is near there.
    """
    model = logistic_model(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.tensor([[start, 0.0]], dtype=torch.float64))
    support = torch.tensor([[[stiff, 0, 0, 0, 0], [0, -1, weight / steepness, steepness, edge]]], dtype=torch.float64)
    query = torch.tensor([[[0.0] * 5, [0, 1, 0, 0, 0]]], dtype=torch.float64)
    eyes = torch.eye(2, dtype=torch.float64)[None]
    for targets in (support, query):
        targets[..., :3] *= 2  # the losses are means over two examples
    tasks = mn.Tasks(mn.Batch(eyes, support), mn.Batch(eyes, query))
    return RandomProblem(model, softplus_loss, tasks, 1.0, steps, 1 + stiff)


def gentle_problems(number: int, seed: int) -> Iterator[RandomProblem]:
    """Draw problems made to break the bound: a gentle piece that a flat direction has yet to meet.

    That of docs/theory.md comes first; then stiffness 30 to 1,000, weight .005 to .05, steepness 100 to 1,000, w₁ up to
    1, 5 to 40 steps, and the solution lies within the piece.
    """
    yield gentle_problem(100.0, 0.02, 300.0, 0.99, 0.01, 20)
    draw = Draw(seed)
    for _ in range(number - 1):
        stiff, weight = draw.log_uniform(30.0, 1000.0), draw.log_uniform(0.005, 0.05)
        steepness, start = draw.log_uniform(100.0, 1000.0), draw.log_uniform(0.001, 1.0)
        yield gentle_problem(stiff, weight, steepness, 1 - weight / 2, start, draw.whole(5, 40))


def _targets(like: Tensor, *columns: Tensor | float) -> Tensor:
    """Columns of :func:`pieces`, of numbers or of what has the shape of ``like``."""
    return torch.stack([torch.as_tensor(column, dtype=like.dtype).expand_as(like) for column in columns], -1)


def _largest(inputs: Tensor) -> float:
    """Largest eigenvalue of the mean of x xᵀ."""
    return float(torch.linalg.matrix_norm(inputs, 2)) ** 2 / len(inputs)
