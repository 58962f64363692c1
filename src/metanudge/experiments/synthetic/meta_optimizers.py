r"""What the growth of the smoothness means for the outer optimizer: iterations from a far start.

Where :math:`\|\nabla^2 F\| \le L_0 + L_1 \|\nabla F\|`, a step of plain SGD must fit the largest curvature on the way,
:math:`\eta \lesssim 1 / (L_0 + L_1 \|\nabla F(\theta_0)\|)`, and is too short wherever F is flatter. Clipping,
:math:`\min(\eta, \gamma / \|g\|) \, g`, and normalising, :math:`\eta \, m / \|m\|`, shorten it where the gradient is
large (Zhang et al., arXiv:1905.11881; with momentum Cutkosky & Mehta, arXiv:2002.03305).

The tasks are those of the study of smoothness, with exact meta-gradients: nothing but the optimizer differs. All
methods share the grid of step sizes and schedules; clipping has its bound γ besides. What counts is the first iteration
by which all starts have reached the target. A schedule that *grows* lets SGD do by hand what clipping does by itself:
such schedules are raced apart from the usual ones, which are constant or fall.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from metanudge.experiments.study import LABELS, Advance, Claim, Study
from metanudge.experiments.synthetic.meta_optimizers_figures import draw
from metanudge.experiments.synthetic.meta_optimizers_races import (
    METHODS,
    Candidate,
    MetaOptimizersSettings,
    Race,
    faster,
    grid,
    race_all,
    setting,
)

SUMMARY = """Four optimizers with exact meta-gradients start at distance {s.distance:g}, where ||∇F|| is about \
{m[initial_norm]:.2g}, and must reach {s.target:g}; each has the best of one grid of {m[candidates][sgd]} settings \
({m[candidates][clipped]} for clipping with its bound). At λ = {s.prox:g} the norm of Hess F is \
{m[curvature][start]:.2g} at the start and {m[curvature][end]:.2g} at the end. SGD takes {m[iterations][sgd]} \
iterations: the largest step it survives at the start is far too short for the end. Clipped SGD takes \
{m[iterations][clipped]}, normalised SGD {m[iterations][normalized]}, with momentum \
{m[iterations][normalized_momentum]} (None: not within {s.budget}). Momentum costs iterations here: the gradients are \
exact, there is no noise to average, and steps of fixed length overshoot until the momentum has turned.

Two things qualify this. With step sizes free to grow, SGD takes {g[iterations][sgd]}: what holds it back is the size \
of its step alone, and who knows the right growth in advance gets most of what clipping gives. And at \
λ = {s.smooth_prox:g}, where the norm of Hess F goes from {f[curvature][start]:.2g} to {f[curvature][end]:.2g} only, \
SGD takes {f[iterations][sgd]}, clipped {f[iterations][clipped]}, normalised {f[iterations][normalized]}, with \
momentum {f[iterations][normalized_momentum]}: steps of fixed length converge as fast as their schedule falls, not \
faster. The advantage comes with the growth of the smoothness and goes with it. At an end of the grid: {at_ends}."""
CAPTION = (
    "Left and middle: norm of the meta-gradient with the best settings of each method, from the first start. Right: "
    "iterations to the target for each step size, with the best of the other settings; none where it is not reached."
)


def run(settings: MetaOptimizersSettings, advance: Advance) -> Study:
    """Race with the usual schedules, with growing ones, and with the usual ones where F is nearly smooth."""
    usual = race_all(settings, settings.prox, False, {}, lambda share: advance(0.5 * share))
    limits = {method: found.iterations for method, found in usual.items() if found.iterations is not None}
    growing = race_all(settings, settings.prox, True, limits, lambda share: advance(0.5 + 0.1 * share))
    only_winners = replace(settings, patience=0)  # the step sizes that lose are of no interest there
    smooth = race_all(only_winners, settings.smooth_prox, False, {}, lambda share: advance(0.6 + 0.4 * share))
    either = {method: faster(usual[method], growing[method]) for method in METHODS}
    metrics: dict[str, Any] = describe(usual, settings, settings.prox) | {
        "target": settings.target,
        "budget": settings.budget,
        "candidates": {method: len(grid(settings, method, False)) for method in METHODS},
        "with_growth": describe(either, settings, settings.prox),
        "smooth": describe(smooth, settings, settings.smooth_prox),
    }
    at_ends = [f"{LABELS[method]} ({', '.join(names)})" for method, names in metrics["edges_hit"].items() if names]
    summary = SUMMARY.format(
        s=settings, m=metrics, g=metrics["with_growth"], f=metrics["smooth"], at_ends="; ".join(at_ends) or "none"
    )
    figures = {"meta_optimizers": (draw(settings, usual, growing["sgd"], smooth), CAPTION)}
    return Study("meta_optimizers", "Meta-optimizers from a far start", summary, claims(metrics), metrics, figures)


def describe(races: dict[str, Race], settings: MetaOptimizersSettings, prox: float) -> dict[str, Any]:
    """Numbers of a set of races."""
    problem, starts = setting(settings, prox)
    ends = torch.stack([run.theta.detach() for run in races["clipped"].best])
    first, last = (torch.linalg.matrix_norm(problem.hessians(problem.solve(x)).mean(0), 2) for x in (starts, ends))
    return {
        "prox": prox,
        "iterations": {method: found.iterations for method, found in races.items()},
        "best_norm": {method: found.norm for method, found in races.items()},
        "initial_norm": max(run.norms[0] for run in races["sgd"].best),
        "curvature": {"start": float(first.mean()), "end": float(last.mean())},
        "chosen": {method: found.best[0].candidate._asdict() for method, found in races.items()},
        "edges_hit": {method: edges(found.best[0].candidate, settings) for method, found in races.items()},
    }


def edges(candidate: Candidate, settings: MetaOptimizersSettings) -> list[str]:
    """Which settings of the chosen candidate lie at an end of the grid."""
    time = candidate.schedule.partition("_")[2]
    ends = {
        "lr": candidate.lr in (min(settings.lrs), max(settings.lrs)),
        "schedule": bool(time) and int(time) in (min(settings.times), max(settings.times)),
        "max_step": candidate.max_step in (min(settings.max_steps), max(settings.max_steps)),
    }
    return [name for name, hit in ends.items() if hit]


def claims(metrics: dict[str, Any]) -> list[Claim]:
    """Hold the iterations against the theory."""
    usual, either, smooth = (
        {method: math.inf if time is None else time for method, time in found["iterations"].items()}
        for found in (metrics, metrics["with_growth"], metrics["smooth"])
    )

    def beats(method: str, times: dict[str, float], condition: str) -> Claim:
        return Claim(
            f"From a far start {LABELS[method]} needs fewer iterations than SGD, {condition}",
            "fewer",
            f"{times[method]:g} against {times['sgd']:g}",
            times[method] < times["sgd"],
        )

    rivals = [method for method in METHODS if method != "sgd"]
    return [
        *(beats(method, usual, "step sizes constant or falling") for method in rivals),
        *(beats(method, either, "step sizes free to grow") for method in rivals),
        Claim(
            "Where F is nearly smooth, SGD is as good as any",
            "within twice the fastest",
            f"{smooth['sgd']:g} against {min(smooth.values()):g}",
            smooth["sgd"] <= 2 * min(smooth.values()),
        ),
    ]
