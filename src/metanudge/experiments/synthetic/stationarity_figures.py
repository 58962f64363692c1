"""Figures of the study of stationarity."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metanudge.experiments.study import COLOURS, LABELS, figure
from metanudge.experiments.synthetic.stationarity_runs import Choice, Curve

DASHES = {"imaml": (0, (6, 6)), "hfmaml": (3, (6, 6)), "tangent": (0, (1, 3))}
"""Of curves that lie on each other: each shows through the gaps of the next."""


def main_figure(curves: dict[str, Curve]) -> Figure:
    """||∇F|| against gradient evaluations, all estimators."""
    made, (panel,) = figure(1, width=8.0, height=3.9)
    for name, curve in curves.items():
        dashes = DASHES.get(name, "-")
        panel.plot(curve.evaluations, curve.norms, color=COLOURS[name], linestyle=dashes, label=LABELS[name])
    panel.set(yscale="log", xlabel="gradient evaluations per task", ylabel="exact $\\|\\nabla F(\\theta)\\|$")
    handles, labels = panel.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside right upper", frameon=False)
    return made


def stochastic_figure(norms: dict[str, Tensor], chosen: dict[str, Choice]) -> Figure:
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
