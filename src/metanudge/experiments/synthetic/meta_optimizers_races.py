"""What the study of meta-optimizers runs (see meta_optimizers.py): all settings of a method, side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim import SGD, Optimizer

from metanudge.experiments.study import Advance
from metanudge.experiments.synthetic.linear_tasks import LinearFamily, LinearTasks
from metanudge.optim import ClippedSGD, NormalizedSGD


@dataclass(frozen=True)
class MetaOptimizersSettings:
    """Settings of the race of meta-optimizers."""

    prox: float = 0.03  # λ at which the smoothness of F varies a thousandfold
    smooth_prox: float = 1.0  # λ at which it hardly varies: the theory promises nothing there
    distance: float = 80.0  # of the starts: the farthest of the study of smoothness
    starts: int = 2  # in different directions; a setting must work from all of them
    target: float = 1e-3  # ||∇F||, from about 100 at the start
    budget: int = 1200  # iterations: enough for SGD
    patience: int = 30  # iterations after a method's first success at which its slower settings are given up
    lrs: tuple[float, ...] = (0.32, 1.0, 3.2, 10.0, 32.0, 100.0, 320.0, 1000.0)  # η, of every method
    times: tuple[int, ...] = (1, 3, 10, 30, 100)  # iterations in which a geometric schedule halves or doubles η
    max_steps: tuple[float, ...] = (3.2, 10.0, 32.0, 100.0)  # γ, of clipping: up to more than the distance
    minibatch: int = 2  # tasks in a noisy step: a quarter of them
    noisy_steps: int = 150  # the step size falling linearly to zero; the last quarter counts
    noisy_lrs: tuple[float, ...] = (0.01, 0.032, 0.1, 0.32, 1.0, 3.2, 10.0, 32.0, 100.0)  # η, of every method
    repeats: int = 3  # noisy runs of the chosen setting; it is tuned on another one
    seed: int = 0  # of tasks, directions and minibatches

    @classmethod
    def quick(cls) -> MetaOptimizersSettings:
        """Return a form that takes a few seconds: one start, a nearer target, a coarser grid."""
        lrs, max_steps = (0.1, 1.0, 10.0, 100.0, 1000.0), (1.0, 10.0, 100.0)
        shorter = cls(starts=1, target=1e-2, budget=400, lrs=lrs, times=(3, 30), max_steps=max_steps)
        return replace(shorter, noisy_steps=80, noisy_lrs=(0.32, 1.0, 3.2, 10.0, 32.0), repeats=1)


class Candidate(NamedTuple):
    """One setting of the grid; η at iteration t is lr * shape(t)."""

    lr: float
    schedule: str
    max_step: float | None = None


METHODS: dict[str, Callable[[nn.Parameter, Candidate], Optimizer]] = {
    "sgd": lambda theta, candidate: SGD([theta], candidate.lr),
    "clipped": lambda theta, candidate: ClippedSGD([theta], candidate.lr, candidate.max_step or math.inf),
    "normalized": lambda theta, candidate: NormalizedSGD([theta], candidate.lr, momentum=0.0),
    "normalized_momentum": lambda theta, candidate: NormalizedSGD([theta], candidate.lr, momentum=0.9),
}


def shape(schedule: str, t: int) -> float:
    """Factor on η at iteration t: constant, root_T (1 / sqrt(1 + t / T)), halving_T, doubling_T, linear_T (0 at T)."""
    kind, _, time = schedule.partition("_")
    at = t / float(time or 1)
    factors = {"constant": 1.0, "root": (1 + at) ** -0.5, "halving": 0.5**at, "doubling": 2.0 ** min(at, 100.0)}
    factor: float = max(1 - at, 0.0) if kind == "linear" else factors[kind]
    return factor


def grid(settings: MetaOptimizersSettings, method: str, growing: bool) -> list[Candidate]:
    """All candidates of a method, with the growing schedules or with the usual ones."""
    usual = ["constant", *(f"{kind}_{time}" for kind in ("root", "halving") for time in settings.times)]
    schedules = [f"doubling_{time}" for time in settings.times] if growing else usual
    max_steps = settings.max_steps if method == "clipped" else (None,)
    return [Candidate(lr, schedule, step) for lr in settings.lrs for schedule in schedules for step in max_steps]


@dataclass
class Run:
    """One candidate from one start, and the meta-gradient norms it has seen."""

    candidate: Candidate
    theta: nn.Parameter
    optimizer: Optimizer
    norms: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, method: str, candidate: Candidate, start: Tensor) -> Run:
        """Begin at ``start``."""
        theta = nn.Parameter(start.clone())
        return cls(candidate, theta, METHODS[method](theta, candidate))

    def step(self, t: int, gradient: Tensor) -> None:
        """Take step t."""
        self.optimizer.param_groups[0]["lr"] = self.candidate.lr * shape(self.candidate.schedule, t)
        self.theta.grad = gradient
        self.optimizer.step()


class Race(NamedTuple):
    """What a method made of a grid."""

    best: list[Run]  # the best candidate, from every start
    iterations: int | None  # it takes to the target, the most among its starts; None: not within the budget
    by_lr: dict[float, int | None]  # the same for the best candidate of every η

    @property
    def norm(self) -> float:
        """The smallest norm, the largest among the starts."""
        return max(min(run.norms) for run in self.best)


def race(
    problem: LinearTasks, starts: Tensor, method: str, growing: bool, settings: MetaOptimizersSettings, limit: int
) -> Race:
    """Run all candidates of a method side by side from all starts."""
    groups = [[Run.of(method, one, start) for start in starts] for one in grid(settings, method, growing)]
    under_way, phi = [run for group in groups for run in group], None
    by_lr: dict[float, int | None] = dict.fromkeys(settings.lrs)
    for t in range(limit + 1):
        theta = torch.stack([run.theta.detach() for run in under_way])
        phi = problem.solve(theta, phi, tolerance=1e-7)
        gradients = problem.gradients(phi).mean(0)
        for run, gradient, norm in zip(under_way, gradients, gradients.norm(dim=-1).tolist(), strict=True):
            run.norms.append(norm)
            if norm > settings.target:
                run.step(t, gradient)
        for group in groups:
            if by_lr[group[0].candidate.lr] is None and all(run.norms[-1] <= settings.target for run in group):
                by_lr[group[0].candidate.lr] = t
        times = [time for time in by_lr.values() if time is not None]
        if times and t >= min(times) + settings.patience:
            break
        kept = [
            k
            for k, run in enumerate(under_way)
            if run.norms[-1] > settings.target
            and by_lr[run.candidate.lr] is None  # another setting of this η was faster
            and run.norms[-1] < 100 * run.norms[0]  # else it diverges
        ]
        if not kept:
            break
        under_way, phi = [under_way[k] for k in kept], phi[:, kept]
    best = min(groups, key=lambda group: result(group, settings.target))
    return Race(best, min((time for time in by_lr.values() if time is not None), default=None), by_lr)


def result(group: list[Run], target: float) -> tuple[int, float]:
    """What candidates are compared by: iterations to the target from all starts; without it the norm they came to."""
    norm = max(min(run.norms) for run in group)
    reached = norm <= target
    return (max(len(run.norms) for run in group) if reached else sys.maxsize), norm


def faster(one: Race, other: Race) -> Race:
    """Of two races of a method the one that took fewer iterations; ties go to the first."""
    return other if (other.iterations or sys.maxsize) < (one.iterations or sys.maxsize) else one


def setting(settings: MetaOptimizersSettings, prox: float) -> tuple[LinearTasks, Tensor]:
    """Make the problem and the starts; the same tasks and starts for every λ."""
    generator, family = Generator().manual_seed(settings.seed), LinearFamily()
    problem = LinearTasks.draw(family, prox, generator)
    directions = torch.randn(settings.starts, family.dimension, generator=generator, dtype=torch.float64)
    return problem, settings.distance * nn.functional.normalize(directions)


def race_all(
    settings: MetaOptimizersSettings, prox: float, growing: bool, limits: dict[str, int], report: Advance
) -> dict[str, Race]:
    """Race every method, each over its own limit of iterations."""
    (problem, starts), found = setting(settings, prox), {}
    for index, method in enumerate(METHODS):
        found[method] = race(problem, starts, method, growing, settings, limits.get(method, settings.budget))
        report((index + 1) / len(METHODS))
    return found
