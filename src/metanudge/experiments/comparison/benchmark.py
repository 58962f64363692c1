"""What is learnt: a network, its tasks, and the grid on which every estimator is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

import metanudge as mn
from metanudge.experiments.networks import mnist1d_network, sinusoid_network
from metanudge.solvers import Solver
from metanudge.tasks.mnist1d import WAYS, Protocol, Split
from metanudge.types import LossFunction

HELD_OUT = 1_000_000
"""Seed of the tasks that are not trained on; the second of them are for testing."""


class Inner(NamedTuple):
    """A point of the grid but for the meta-step: how a task is adapted to.

    Attributes:
        solver: The inner solver.
        prox: λ; 0 for none, which estimators that rest on the proximal problem cannot take.
        radius: ``sharpness_radius``.
    """

    solver: Solver
    prox: float
    radius: float = 0.0

    def __str__(self) -> str:
        """For tables."""
        radius = f", sharpness_radius {self.radius:g}" if self.radius else ""
        return f"{self.solver}, prox {self.prox:g}{radius}"


class Benchmark(NamedTuple):
    """A family of tasks and a network.

    Attributes:
        network: From a seed.
        loss: Support and query loss.
        metric: What is reported.
        higher: Whether more of it is better.
        train: ``(seed, first, number)`` to tasks.
        validation: The first ``number`` of the tasks that settings are chosen by.
        test: The first ``number`` of those that decide.
        inners: The grid's inner problems.
        lrs: The grid's step sizes of Adam.
        unit: Of the metric, for axes.
        methods: Names in ``METHODS`` of those to compare; empty for all.
    """

    network: Callable[[int], nn.Module]
    loss: LossFunction
    metric: LossFunction
    higher: bool
    train: Callable[[int, int, int], mn.Tasks | list[mn.Tasks]]
    validation: Callable[[int], mn.Tasks | list[mn.Tasks]]
    test: Callable[[int], mn.Tasks | list[mn.Tasks]]
    inners: tuple[Inner, ...]
    lrs: tuple[float, ...]
    unit: str
    methods: tuple[str, ...] = ()

    def rank(self, score: float) -> float:
        """More is better; nothing is worse than no number."""
        if math.isnan(score):
            return -math.inf
        return score if self.higher else -score


def sinusoid(activation: str) -> Benchmark:
    """Finn's sinusoids, 10 shots."""
    return Benchmark(
        network=partial(sinusoid_network, activation),
        loss=mn.metrics.squared_error,
        metric=mn.metrics.squared_error,
        higher=False,
        train=lambda seed, first, number: mn.tasks.sinusoid(number, seed=seed, first=first),
        validation=lambda number: mn.tasks.sinusoid(number, seed=HELD_OUT),
        test=lambda number: mn.tasks.sinusoid(number, seed=HELD_OUT + 1),
        inners=(
            Inner(mn.GradientDescent(5, lr=0.01), 0.0),
            Inner(mn.GradientDescent(16, lr=0.01), 0.0),
            Inner(mn.GradientDescent(16, lr=0.01), 2.0),
            Inner(mn.Nesterov(16), 2.0),
        ),
        lrs=(1e-3, 3e-3),
        unit="test squared error",
    )


def mnist1d(protocol: Protocol, activation: str) -> Benchmark:
    """MNIST-1D, 5 shots and 15 queries of a class."""

    def draw(split: Split, seed: int, first: int, number: int) -> list[mn.Tasks]:
        return mn.tasks.mnist1d(protocol, split, seed=seed).take(number, first)

    return Benchmark(
        network=partial(mnist1d_network, WAYS[protocol], activation),
        loss=mn.metrics.cross_entropy,
        metric=mn.metrics.accuracy,
        higher=True,
        train=lambda seed, first, number: draw("train", seed, first, number),
        validation=lambda number: draw("validation", HELD_OUT, 0, number),
        test=lambda number: draw("test", HELD_OUT + 1, 0, number),
        inners=(
            Inner(mn.GradientDescent(5, lr=0.1), 0.0),
            Inner(mn.GradientDescent(16, lr=0.05), 1.0),
            Inner(mn.Nesterov(16), 1.0),
        ),
        lrs=(3e-3, 5e-3, 1e-2),
        unit="test accuracy",
    )


def flat(protocol: Protocol, activation: str) -> Benchmark:
    """MNIST-1D, the sharpness radius a part of the grid, 0 among its values."""
    inners = tuple(Inner(mn.Nesterov(16), 1.0, radius) for radius in (0.0, 0.1, 0.3))
    methods = ("fobmaml", "fobmaml_light", "maml", "hfmaml")
    return mnist1d(protocol, activation)._replace(inners=inners, lrs=(5e-3, 1e-2), methods=methods)


BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    "sinusoid_tanh": lambda: sinusoid("tanh"),
    "sinusoid_relu": lambda: sinusoid("relu"),
    "permuted_labels": lambda: mnist1d("permuted_labels", "relu"),
    "permuted_labels_gelu": lambda: mnist1d("permuted_labels", "gelu"),
    "new_classes": lambda: mnist1d("new_classes", "relu"),
    "permuted_labels_flat": lambda: flat("permuted_labels", "relu"),
}
"""By name, which travels to other processes where functions do not."""
