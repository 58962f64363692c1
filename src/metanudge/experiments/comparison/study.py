"""Tune every estimator on the shared grid, train it at its best, and say what came out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from metanudge.experiments.comparison.benchmark import BENCHMARKS
from metanudge.experiments.comparison.training import METHODS, Cost, Job, Outcome, costs, train
from metanudge.experiments.pool import run_all
from metanudge.experiments.study import Advance


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison; float32, one thread a process."""

    meta_steps: int = 2000
    tasks: int = 25  # a meta-step
    seeds: int = 3  # of the network's start and the training tasks
    tuning_steps: int = 200  # meta-steps of a run on the grid, with the first seed
    validation_tasks: int = 200  # which settings, and the parameters that are kept of a training, are chosen by
    test_tasks: int = 1000
    curve_tasks: int = 200  # of the test tasks, for the curves
    points: int = 20  # of a curve
    repeats: int = 15  # timed meta-steps of every estimator
    compiled: bool = True  # train compiled, and time it, where an estimator allows it; which takes a minute for each
    workers: int = 2  # processes; only the time depends on it
    seed: int = 0

    @classmethod
    def quick(cls) -> Self:
        """A taste: too short for the claims to mean anything."""
        return cls(60, 10, 1, 10, 50, 100, 50, 4, 3, compiled=False)


@dataclass(frozen=True)
class MNIST1DSettings(ComparisonSettings):
    """The same for a network that costs more."""

    meta_steps: int = 400
    tasks: int = 10
    tuning_steps: int = 400  # fewer choose what is ahead at first and falls back
    validation_tasks: int = 100
    points: int = 10

    @classmethod
    def quick(cls) -> Self:
        """A taste: too short for the claims to mean anything."""
        return cls(10, 4, 1, 2, 20, 60, 20, 2, 3, compiled=False)


class Trial(NamedTuple):
    """A point of the grid, and what it gave on the validation tasks."""

    job: Job
    score: float


class Method(NamedTuple):
    """What one estimator gave.

    Attributes:
        best: Its job at its best settings and the first seed.
        trials: On the grid.
        outcomes: One a seed.
        cost: Of a meta-step.
    """

    best: Job
    trials: list[Trial]
    outcomes: list[Outcome]
    cost: Cost

    @property
    def scores(self) -> list[float]:
        """The mean curve over seeds, of the parameters kept so far."""
        return [statistics.fmean(same) for same in zip(*(one.kept_scores for one in self.outcomes), strict=True)]

    @property
    def latest(self) -> list[float]:
        """The same of the parameters at every look, whatever the validation tasks say of them."""
        return [statistics.fmean(same) for same in zip(*(one.scores for one in self.outcomes), strict=True)]

    @property
    def seconds(self) -> list[float]:
        """Processor time at the curve's points."""
        return [step * self.cost.seconds for step in self.outcomes[0].steps]

    @property
    def compiled_seconds(self) -> list[float]:
        """The same compiled, where it can be, after the wall-clock time of compiling."""
        compiled = self.cost.compiled
        if compiled is None:
            return self.seconds
        return [compiled.building + step * compiled.seconds for step in self.outcomes[0].steps]

    @property
    def final(self) -> Tensor:
        """The metric of every test task and seed at the end."""
        return torch.cat([one.values[:, -1] for one in self.outcomes])


def compare(name: str, settings: ComparisonSettings, advance: Advance) -> dict[str, Method]:
    """Tune, train and time every method on a benchmark, but for those that can take no point of its grid."""
    benchmark = BENCHMARKS[name]()
    grid = [
        Job(
            name,
            method,
            inner,
            lr,
            settings.seed,
            settings.tuning_steps,
            settings.tasks,
            max(settings.tuning_steps // settings.points, 1),
            settings.validation_tasks,
            curve_tasks=0,
            test_tasks=0,
            compile=settings.compiled,
        )
        for method in benchmark.methods or METHODS
        for inner in benchmark.inners
        for lr in benchmark.lrs
    ]
    grid = [job for job in grid if job.possible]
    tried = run_all(
        train, grid, settings.workers, advance, lambda done: 0.3 * done / len(grid), "trainings of the grid"
    )
    trials = [Trial(job, outcome.best_validation) for job, outcome in zip(grid, tried, strict=True)]
    best = {
        method: max(
            (trial for trial in trials if trial.job.method == method), key=lambda trial: benchmark.rank(trial.score)
        ).job
        for method in dict.fromkeys(job.method for job in grid)
    }
    every = max(settings.meta_steps // settings.points, 1)
    full = replace(
        grid[0],
        meta_steps=settings.meta_steps,
        every=every,
        curve_tasks=settings.curve_tasks,
        test_tasks=settings.test_tasks,
    )
    jobs = [
        replace(full, method=method, inner=job.inner, lr=job.lr, seed=settings.seed + index)
        for index in range(settings.seeds)
        for method, job in best.items()
    ]
    outcomes = run_all(train, jobs, settings.workers, advance, lambda done: 0.3 + 0.68 * done / len(jobs))
    first = jobs[: len(best)]
    spent = costs(first, settings.repeats, settings.compiled)
    found = {}
    for place, method in enumerate(best):
        found[method] = Method(
            first[place],
            [trial for trial in trials if trial.job.method == method],
            outcomes[place :: len(best)],
            spent[place],
        )
    advance(1.0)
    return found


def final_score(outcome: Outcome) -> float:
    """Mean over the test tasks."""
    return float(outcome.values[:, -1].mean())


def metrics_of(found: Mapping[str, Method]) -> dict[str, Any]:
    """By method: ``mean`` and ``ci95`` over seeds and tasks, ``seconds``, ``gradient_evaluations``, ``peak_bytes``."""
    metrics = {}
    for name, method in found.items():
        final, last = method.final, method.outcomes[-1]
        curve = torch.cat([one.values for one in method.outcomes]).mean(0)
        metrics[name] = {
            "mean": float(final.mean()),
            "ci95": float(1.96 * final.std() / len(final) ** 0.5),
            "median": float(final.median()),
            "seeds": [final_score(one) for one in method.outcomes],
            "kept_from": [one.steps[one.kept[-1]] for one in method.outcomes],
            "seconds": method.cost.seconds * method.best.meta_steps,
            "seconds_per_meta_step": method.cost.seconds,
            "gradient_evaluations": statistics.fmean(one.gradients for one in method.outcomes) * method.best.meta_steps,
            "compiled": None if method.cost.compiled is None else method.cost.compiled._asdict(),
            "peak_bytes": method.cost.peak_bytes,
            "residual": statistics.fmean(one.residual for one in method.outcomes),
            "dropped_tasks": sum(one.dropped for one in method.outcomes),
            "failed_meta_steps": sum(one.failed for one in method.outcomes),
            "settings": {"inner": str(method.best.inner), "lr": method.best.lr},
            "per_adaptation_step": curve,
            "curve": {
                "meta_steps": last.steps,
                "mean": method.scores,
                "latest": method.latest,
                "seconds": method.seconds,
                "compiled_seconds": method.compiled_seconds,
            },
            "grid": [
                {"inner": str(trial.job.inner), "lr": trial.job.lr, "validation": trial.score}
                for trial in method.trials
            ],
        }
    return metrics


def score_at(times: Sequence[float], scores: Sequence[float], seconds: float) -> float:
    """A curve's value at the last of its points within ``seconds`` of meta-training; before the first, no number."""
    within = [score for time, score in zip(times, scores, strict=True) if time <= seconds]
    return within[-1] if within else math.nan


def seconds_to(times: Sequence[float], scores: Sequence[float], score: float, higher: bool) -> float:
    """When a curve first reaches ``score``; infinity if it does not."""
    reached = (
        time for time, value in zip(times, scores, strict=True) if (value >= score if higher else value <= score)
    )
    return next(reached, math.inf)
