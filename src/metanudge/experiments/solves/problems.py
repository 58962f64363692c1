r"""The inner problems of the study: convex, ill-conditioned, smooth, kinked, and a convolutional one.

Tasks are pure functions of (seed, index); parameters are PyTorch's default draw for the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import metanudge as mn
from metanudge.experiments.networks import mnist1d_network, seeded, sinusoid_network
from metanudge.tasks.mnist1d import signals
from metanudge.tasks.seeding import stream
from metanudge.types import LossFunction


class Inner(NamedTuple):
    """An inner problem, one a task: min over φ of f̂(φ) + prox/2 ||φ - θ||², θ the model's parameters.

    Attributes:
        model: At θ.
        loss: f̂ and f.
        tasks: A stack.
        prox: λ.
        least_squares: Whether the loss is ``metrics.squared_error``.
    """

    model: nn.Module
    loss: LossFunction
    tasks: mn.Tasks
    prox: float
    least_squares: bool


def logistic(number: int, seed: int) -> Inner:
    """The library's logistic tasks, 20 parameters; condition number some tens."""
    tasks = mn.tasks.logistic(number, seed=seed)
    return Inner(mn.tasks.logistic_model(20), mn.tasks.logistic_loss, tasks, 0.1, False)


def ridge_tasks(number: int, seed: int, features: int = 20, condition: float = 1e4) -> mn.Tasks:
    """Linear regressions whose inner problem has curvatures 1 to ``condition``, log-uniform, where prox is 1."""
    spectrum = torch.logspace(0, float(np.log10(condition)), features, dtype=torch.float64) - 1

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def rotation() -> Tensor:
            found: Tensor = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[
                0
            ]
            return found

        inputs = rotation() @ torch.diag((features / 2 * spectrum).sqrt()) @ rotation().T
        return inputs, torch.randn(features, 1, generator=generator, dtype=torch.float64)

    batches = []
    for half in range(2):
        drawn = [draw(stream(seed, 2 * index + half)) for index in range(number)]
        batches.append(mn.Batch(*(torch.stack(same) for same in zip(*drawn, strict=True))))
    return mn.Tasks(*batches)


def ridge(number: int, seed: int) -> Inner:
    """Ridge regression of condition 1e4, 20 parameters: what accelerated methods are for."""
    model = seeded(lambda: nn.Linear(20, 1, bias=False, dtype=torch.float64), seed)
    return Inner(model, mn.metrics.squared_error, ridge_tasks(number, seed), 1.0, True)


def sinusoid(activation: str, number: int, seed: int) -> Inner:
    """Finn's sinusoids on the network 1-40-40-1, 10 shots, at PyTorch's random initialisation."""
    model = sinusoid_network(activation, seed)
    return Inner(model, mn.metrics.squared_error, mn.tasks.sinusoid(number, seed=seed), 2.0, True)


def mnist1d_tasks(number: int, seed: int, shots: int = 5, samples: int = 1000) -> mn.Tasks:
    """Ten digits under permuted labels, ``shots`` of each to adapt and as many to judge."""
    inputs, digits = signals(samples, seed)
    batches: tuple[list[mn.Batch], list[mn.Batch]] = ([], [])
    for index in range(number):
        generator = stream(seed, index)
        labels = torch.randperm(10, generator=generator)
        chosen = []
        for digit in range(10):
            places = (digits == digit).nonzero()[:, 0]
            chosen.append(places[torch.randperm(len(places), generator=generator)[: 2 * shots]])
        rows_of = torch.stack(chosen)
        for half, rows in zip(batches, (rows_of[:, :shots].flatten(), rows_of[:, shots:].flatten()), strict=True):
            half.append(mn.Batch(inputs[rows], labels[digits[rows]]))
    return mn.Tasks(*(mn.Batch(*(torch.stack(same) for same in zip(*half, strict=True))) for half in batches))


def mnist1d(number: int, seed: int) -> Inner:
    """10-way 5-shot MNIST-1D on three convolutions of 25 channels."""
    return Inner(mnist1d_network(10, "relu", seed), mn.metrics.cross_entropy, mnist1d_tasks(number, seed), 1.0, False)


PROBLEMS: dict[str, Callable[[int, int], Inner]] = {
    "logistic": logistic,
    "ridge": ridge,
    "sinusoid_tanh": lambda number, seed: sinusoid("tanh", number, seed),
    "sinusoid_relu": lambda number, seed: sinusoid("relu", number, seed),
    "mnist1d": mnist1d,
}
"""By name: from a number of tasks and a seed to the inner problem."""
