"""Descents on noisy gradients: how a step size is chosen, what counts, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metanudge.experiments.study import COLOURS, LABELS, figure


class Choice(NamedTuple):
    """A tuned step size.

    Attributes:
        step_size: Of the grid, the one with the smallest score.
        at_edge: Whether it is the smallest or the largest of the grid.
        scores: The score of every step size.
    """

    step_size: float
    at_edge: bool
    scores: dict[float, float]


def choose(step_sizes: Sequence[float], score: Callable[[float], float]) -> Choice:
    """Try all of a grid."""
    scores = {size: score(size) for size in step_sizes}
    best = min(step_sizes, key=scores.__getitem__)
    return Choice(best, best in (min(step_sizes), max(step_sizes)), scores)


def last_quarter(norms: Tensor) -> Tensor:
    """Mean over the last quarter of the steps, ``[...]`` from ``[..., steps]``."""
    return norms[..., -(norms.shape[-1] // 4) :].mean(-1)


def noise_figure(norms: dict[str, Tensor], chosen: dict[str, Choice]) -> Figure:
    """||∇F|| over the meta-steps at the tuned step sizes, and its last quarter over all step sizes."""
    made, (left, right) = figure(2, width=4.2, height=3.4)
    for name, runs in norms.items():
        steps = torch.arange(1, runs.shape[1] + 1)
        left.plot(steps, runs.mean(0), color=COLOURS[name], label=LABELS[name])
        left.fill_between(steps, runs.amin(0), runs.amax(0), color=COLOURS[name], alpha=0.15, linewidth=0)
        scores = chosen[name].scores
        right.plot(list(scores), list(scores.values()), "o-", markersize=3.5, color=COLOURS[name], label=LABELS[name])
    left.set(yscale="log", xlabel="meta-step", ylabel="exact $\\|\\nabla F(\\theta)\\|$")
    right.set(yscale="log", xscale="log", xlabel="step size", ylabel="mean of the last quarter")
    right.set_xscale("log", base=2)
    handles, labels = left.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return made
