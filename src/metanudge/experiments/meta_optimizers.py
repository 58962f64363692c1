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
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.optim import SGD, Optimizer

from metanudge.experiments.smoothness import LinearTasks, SmoothnessSettings
from metanudge.experiments.study import COLOURS, LABELS, Advance, Claim, Study, figure
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
    seed: int = 0  # of tasks and directions

    @classmethod
    def quick(cls) -> MetaOptimizersSettings:
        """Return a form that takes a few seconds: one start, a nearer target, a coarser grid."""
        lrs, max_steps = (0.1, 1.0, 10.0, 100.0, 1000.0), (1.0, 10.0, 100.0)
        return cls(starts=1, target=1e-2, budget=400, lrs=lrs, times=(3, 30), max_steps=max_steps)


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
    """Factor on η at iteration t: ``constant``, ``root_T`` = 1 / sqrt(1 + t / T), ``halving_T``, ``doubling_T``."""
    kind, _, time = schedule.partition("_")
    at = t / float(time or 1)
    factors = {"constant": 1.0, "root": (1 + at) ** -0.5, "halving": 0.5**at, "doubling": 2.0 ** min(at, 100.0)}
    factor: float = factors[kind]
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


def setting(settings: MetaOptimizersSettings, prox: float) -> tuple[LinearTasks, Tensor]:
    """Make the problem and the starts; the same tasks and starts for every λ."""
    generator, family = Generator().manual_seed(settings.seed), SmoothnessSettings()
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


def faster(one: Race, other: Race) -> Race:
    """Of two races of a method the one that took fewer iterations; ties go to the first."""
    return other if (other.iterations or sys.maxsize) < (one.iterations or sys.maxsize) else one


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


def draw(settings: MetaOptimizersSettings, usual: dict[str, Race], grown: Race, smooth: dict[str, Race]) -> Figure:
    """Curves at both λ, and how much the step size matters."""
    made, (left, middle, right) = figure(3, width=3.6, height=3.2)
    for axis, races, prox in ((left, usual, settings.prox), (middle, smooth, settings.smooth_prox)):
        for method, found in races.items():
            curve(axis, found.best[0].norms, color=COLOURS[method], label=LABELS[method])
        axis.axhline(settings.target, color="#7f7f7f", ls=":", lw=1)
        axis.set_title(f"λ = {prox:g}", fontsize=10)
        axis.set(xscale="log", yscale="log", xlabel="iteration + 1", ylabel="‖∇F‖")
    curve(left, grown.best[0].norms, color=COLOURS["sgd"], ls="--", label="SGD, growing step")
    lines = [(COLOURS[method], "-", found) for method, found in usual.items()] + [(COLOURS["sgd"], "--", grown)]
    for colour, dashes, found in lines:
        reached = [(lr, time) for lr, time in found.by_lr.items() if time is not None]
        right.plot([lr for lr, _ in reached], [time for _, time in reached], "o", ls=dashes, ms=3.5, color=colour)
    right.set_title(f"λ = {settings.prox:g}", fontsize=10)
    right.set(xscale="log", yscale="log", xlabel="step size η", ylabel="iterations to the target")
    right.set_xlim(min(settings.lrs) / 1.5, max(settings.lrs) * 1.5)
    handles, labels = left.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return made


def curve(axis: Axes, norms: list[float], **style: Any) -> None:
    """One run."""
    axis.plot(range(1, len(norms) + 1), norms, lw=1.4, **style)
