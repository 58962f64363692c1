"""Figures of the study of stationarity."""

from __future__ import annotations

from matplotlib.figure import Figure

from metanudge.experiments.study import COLOURS, LABELS, figure
from metanudge.experiments.synthetic.stationarity_runs import Curve

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
