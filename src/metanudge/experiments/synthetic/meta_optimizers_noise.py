"""The noisy part of the study of meta-optimizers (see meta_optimizers.py): a few of the tasks a step."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from metanudge.experiments.study import Advance
from metanudge.experiments.synthetic.meta_optimizers_races import (
    METHODS,
    Candidate,
    MetaOptimizersSettings,
    Run,
    setting,
)
from metanudge.experiments.synthetic.noise import Choice, choose, last_quarter


class Noisy(NamedTuple):
    """What a method made of minibatches of tasks.

    Attributes:
        choice: Its step sizes and their scores on the tuning run, each with the best bound where there is one.
        candidate: The best of all.
        norms: ||∇F|| of the other runs at its every step, ``[runs, steps]``.
    """

    choice: Choice
    candidate: Candidate
    norms: Tensor

    @property
    def score(self) -> float:
        """Mean over the last quarter of all runs."""
        return float(last_quarter(self.norms).mean())


def minibatches(settings: MetaOptimizersSettings, tasks: int, seed: int) -> Tensor:
    """Which tasks a run takes at each step, ``[steps, minibatch]``; the same for every method and candidate."""
    generator = Generator().manual_seed(1000 * settings.seed + seed)
    drawn = [torch.randperm(tasks, generator=generator)[: settings.minibatch] for _ in range(settings.noisy_steps)]
    return torch.stack(drawn)


def noisy_runs(settings: MetaOptimizersSettings, prox: float, method: str) -> Noisy:
    """All candidates of a method, on the tuning noise and on that of the other runs, side by side."""
    problem, starts = setting(settings, prox)
    bounds = settings.max_steps if method == "clipped" else (None,)
    schedule = f"linear_{settings.noisy_steps}"
    candidates = [Candidate(lr, schedule, bound) for lr in settings.noisy_lrs for bound in bounds]
    groups = [[Run.of(method, one, starts[0]) for one in candidates] for _ in range(settings.repeats + 1)]
    chosen = [minibatches(settings, problem.number, seed) for seed in range(len(groups))]
    phi = None
    for t in range(settings.noisy_steps):
        theta = torch.stack([run.theta.detach() for group in groups for run in group])
        phi = problem.solve(theta, phi, tolerance=1e-7)
        gradients = problem.gradients(phi).reshape(problem.number, len(groups), len(candidates), -1)
        norms = gradients.mean(0).norm(dim=-1).tolist()
        for k, group in enumerate(groups):
            noisy = gradients[chosen[k][t], k].mean(0)
            for run, gradient, norm in zip(group, noisy, norms[k], strict=True):
                run.norms.append(norm)
                if norm < 100 * run.norms[0]:  # else it diverges: it stays where it is, and loses
                    run.step(t, gradient)
    tuning, *others = groups
    scores = {run.candidate: float(last_quarter(torch.tensor(run.norms))) for run in tuning}
    best = {lr: min(map(scores.__getitem__, same)) for lr, same in groupby(candidates, lambda one: one.lr)}
    winner = min(candidates, key=scores.__getitem__)
    place = candidates.index(winner)
    reported = torch.tensor([group[place].norms for group in others], dtype=torch.float64)
    return Noisy(choose(settings.noisy_lrs, best.__getitem__), winner, reported)


def noisy_all(settings: MetaOptimizersSettings, report: Advance) -> dict[float, dict[str, Noisy]]:
    """Every method, where the smoothness of F varies and where it hardly does."""
    found: dict[float, dict[str, Noisy]] = {}
    weights = (settings.prox, settings.smooth_prox)
    for i, prox in enumerate(weights):
        found[prox] = {}
        for k, method in enumerate(METHODS):
            found[prox][method] = noisy_runs(settings, prox, method)
            report((i + (k + 1) / len(METHODS)) / len(weights))
    return found
