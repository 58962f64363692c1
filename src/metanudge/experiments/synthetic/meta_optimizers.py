r"""What the growth of the smoothness means for the outer optimizer: iterations from a far start.

Where :math:`\|\nabla^2 F\| \le L_0 + L_1 \|\nabla F\|`, a step of plain SGD must fit the largest curvature on the way,
:math:`\eta \lesssim 1 / (L_0 + L_1 \|\nabla F(\theta_0)\|)`, and is too short wherever F is flatter. Clipping,
:math:`\min(\eta, \gamma / \|g\|) \, g`, and normalising, :math:`\eta \, m / \|m\|`, shorten it where the gradient is
large (Zhang et al., arXiv:1905.11881; with momentum Cutkosky & Mehta, arXiv:2002.03305).

The tasks are those of the study of smoothness, with exact meta-gradients: nothing but the optimizer differs. All
methods share the grid of step sizes and schedules; clipping has its bound γ besides. What counts is the first iteration
by which all starts have reached the target. A schedule that *grows* lets SGD do by hand what clipping does by itself:
such schedules are raced apart from the usual ones, which are constant or fall.

With noise, a minibatch of the tasks a step, all methods share one schedule, linear to zero, and what counts is the
exact ||∇F|| over the last quarter of the steps: the comparison the momentum of the normalised method is made for.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from metanudge.experiments.study import LABELS, Advance, Claim, Study
from metanudge.experiments.synthetic.meta_optimizers_figures import draw
from metanudge.experiments.synthetic.meta_optimizers_noise import Noisy, noisy_all
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
from metanudge.experiments.synthetic.noise import last_quarter, noise_figure

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
faster. The advantage comes with the growth of the smoothness and goes with it. At an end of the grid: {at_ends}.

With noise, {s.minibatch} of the tasks a step and the step size falling linearly to zero in {s.noisy_steps} steps, the \
mean norm over the last quarter at λ = {s.prox:g} is {n[gradient_norm][sgd]:.2g} for SGD, \
{n[gradient_norm][clipped]:.2g} clipped, {n[gradient_norm][normalized]:.2g} normalised, \
{n[gradient_norm][normalized_momentum]:.2g} with momentum; at λ = {s.smooth_prox:g} it is \
{q[gradient_norm][sgd]:.2g}, {q[gradient_norm][clipped]:.2g}, {q[gradient_norm][normalized]:.2g} and \
{q[gradient_norm][normalized_momentum]:.2g}."""
CAPTION = (
    "Left and middle: norm of the meta-gradient with the best settings of each method, from the first start. Right: "
    "iterations to the target for each step size, with the best of the other settings; none where it is not reached."
)
NOISE_CAPTION = (
    "Minibatches of tasks where the smoothness of F varies. Left: exact norm of the meta-gradient, every method at its "
    "tuned settings, mean and range of the runs. Right: what a wrong step size costs (the tuning run)."
)


def run(settings: MetaOptimizersSettings, advance: Advance) -> Study:
    """Race with the usual schedules, with growing ones, and with the usual ones where F is nearly smooth."""
    usual = race_all(settings, settings.prox, False, {}, lambda share: advance(0.4 * share))
    limits = {method: found.iterations for method, found in usual.items() if found.iterations is not None}
    growing = race_all(settings, settings.prox, True, limits, lambda share: advance(0.4 + 0.1 * share))
    only_winners = replace(settings, patience=0)  # the step sizes that lose are of no interest there
    smooth = race_all(only_winners, settings.smooth_prox, False, {}, lambda share: advance(0.5 + 0.2 * share))
    noisy = noisy_all(settings, lambda share: advance(0.7 + 0.3 * share))
    either = {method: faster(usual[method], growing[method]) for method in METHODS}
    metrics: dict[str, Any] = describe(usual, settings, settings.prox) | {
        "target": settings.target,
        "budget": settings.budget,
        "candidates": {method: len(grid(settings, method, False)) for method in METHODS},
        "with_growth": describe(either, settings, settings.prox),
        "smooth": describe(smooth, settings, settings.smooth_prox),
        "noisy": describe_noisy(noisy[settings.prox]),
        "noisy_smooth": describe_noisy(noisy[settings.smooth_prox]),
    }
    at_ends = [f"{LABELS[method]} ({', '.join(names)})" for method, names in metrics["edges_hit"].items() if names]
    summary = SUMMARY.format(
        s=settings,
        m=metrics,
        g=metrics["with_growth"],
        f=metrics["smooth"],
        n=metrics["noisy"],
        q=metrics["noisy_smooth"],
        at_ends="; ".join(at_ends) or "none",
    )
    shown = noisy[settings.prox].items()
    noise = noise_figure({name: one.norms for name, one in shown}, {name: one.choice for name, one in shown})
    figures = {
        "meta_optimizers": (draw(settings, usual, growing["sgd"], smooth), CAPTION),
        "meta_optimizers_noise": (noise, NOISE_CAPTION),
    }
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


def describe_noisy(found: dict[str, Noisy]) -> dict[str, Any]:
    """Numbers of the noisy runs at one λ."""
    return {
        "gradient_norm": {method: one.score for method, one in found.items()},
        "per_run": {method: last_quarter(one.norms).tolist() for method, one in found.items()},
        "chosen": {method: one.candidate._asdict() for method, one in found.items()},
        "at_edge": {method: one.choice.at_edge for method, one in found.items()},
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

    def beats_under_noise(method: str) -> Claim:
        norms = metrics["noisy"]["gradient_norm"]
        return Claim(
            f"Under task noise, where the smoothness varies, {LABELS[method]} ends nearer to stationarity than SGD",
            "mean norm of ∇F in the last quarter below SGD's, each at its tuned settings",
            f"{norms[method]:.2g} against {norms['sgd']:.2g}",
            norms[method] < norms["sgd"],
        )

    rivals = [method for method in METHODS if method != "sgd"]
    return [
        *(beats(method, usual, "step sizes constant or falling") for method in rivals),
        *(beats(method, either, "step sizes free to grow") for method in rivals),
        *map(beats_under_noise, rivals),
        Claim(
            "Where F is nearly smooth, SGD is as good as any",
            "within twice the fastest",
            f"{smooth['sgd']:g} against {min(smooth.values()):g}",
            smooth["sgd"] <= 2 * min(smooth.values()),
        ),
    ]
