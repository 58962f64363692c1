"""One meta-training on the sinusoid, as a job for a pool of processes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

import metanudge as mn
from metanudge.estimators.base import Estimator
from metanudge.experiments.networks import sinusoid_network
from metanudge.solvers import Solver


@dataclass(frozen=True)
class Job:
    """A meta-training.

    Attributes:
        name: Of the method.
        activation: "tanh" or "relu".
        seed: Of the network's start and of the training tasks.
        prox: λ; 1 is the learner's default.
        solver: None for the learner's default.
        estimator: None for the learner's default.
        meta_steps: Of Adam, with clipping of the meta-gradient.
        every: Meta-steps between evaluations; 0 for none.
    """

    name: str
    activation: str
    seed: int
    meta_steps: int
    every: int
    prox: float = 1.0
    solver: Solver | None = None
    estimator: Estimator | None = None
    tasks: int = 25
    shots: int = 10
    lr: float = 1e-3
    clip: float = 10.0
    test_tasks: int = 1000
    test_seed: int = 1_000_000


class Outcome(NamedTuple):
    """What a job found.

    Attributes:
        steps: Meta-steps at which the test error was taken.
        mean: Test squared error after adaptation, mean over tasks.
        median: The median.
        failed: Test tasks without a finite error, at the end.
        dropped: Training tasks left out, in all.
        nonfinite: Meta-steps that raised or left a meta-gradient that is not finite.
        gradients: Gradient evaluations a task and meta-step.
        residual: Mean relative residual over the last tenth.
        error_bound: Mean certified bound over the last tenth.
    """

    steps: list[int]
    mean: list[float]
    median: list[float]
    failed: int
    dropped: int
    nonfinite: int
    gradients: float
    residual: float
    error_bound: float


def train(job: Job) -> Outcome:
    """Meta-train."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)  # of what a step draws
    model = sinusoid_network(job.activation, job.seed)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=job.prox, solver=job.solver, estimator=job.estimator)
    optimizer = torch.optim.Adam(model.parameters(), job.lr)
    steps: list[int] = []
    mean: list[float] = []
    median: list[float] = []
    dropped = gradients = nonfinite = failed = 0
    last: list[tuple[float, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        warnings.simplefilter("ignore", mn.NonFiniteWarning)
        for index in range(job.meta_steps):
            optimizer.zero_grad()
            try:
                step = learner.backward(
                    mn.tasks.sinusoid(job.tasks, shots=job.shots, seed=job.seed, first=job.tasks * index)
                )
            except mn.NonFiniteError:
                nonfinite += 1
                continue
            norm = nn.utils.clip_grad_norm_(model.parameters(), job.clip)
            nonfinite += not bool(norm.isfinite())
            optimizer.step()
            dropped += step.dropped_tasks
            gradients += step.gradient_evaluations
            if index >= 0.9 * job.meta_steps:
                last.append((step.residual, step.error_bound))
            if job.every and (index + 1) % job.every == 0:
                test = mn.tasks.sinusoid(job.test_tasks, shots=job.shots, seed=job.test_seed)
                values = learner.evaluate(test).values[:, -1]
                failed = int((~values.isfinite()).sum())
                steps.append(index + 1)
                mean.append(float(values.mean()))
                median.append(float(values.median()))
    residual, bound = (sum(column) / max(len(last), 1) for column in zip(*last, strict=True)) if last else (0.0, 0.0)
    per_step = gradients / (job.tasks * job.meta_steps)
    return Outcome(steps, mean, median, failed, dropped, nonfinite, per_step, residual, bound)
