"""The figure of the study of convergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

LABELS = {
    "nesterov": "Nesterov (default)",
    "nesterov_fixed": "Nesterov, L fixed",
    "nesterov_no_restart": "Nesterov, no restart",
    "gradient_descent": "gradient descent",
    "heavy_ball": "heavy ball",
    "barzilai_borwein_long": "Barzilai-Borwein, long",
    "barzilai_borwein_short": "Barzilai-Borwein, short",
    "anderson": "Anderson, memory 5",
    "lbfgs": "L-BFGS, memory 8",
    "adam": "Adam, step 0.01",
    "gauss_newton_4": "Gauss-Newton, 4 CG steps",
    "gauss_newton_16": "Gauss-Newton, 16 CG steps",
}
STYLES: dict[str, tuple[str, Any]] = {
    "nesterov": ("#0072b2", "-"),
    "nesterov_fixed": ("#0072b2", (0, (4, 2))),
    "nesterov_no_restart": ("#0072b2", (0, (1, 1.5))),
    "gradient_descent": ("#7f7f7f", "-"),
    "heavy_ball": ("#7f7f7f", (0, (4, 2))),
    "barzilai_borwein_long": ("#e69f00", (0, (4, 2))),
    "barzilai_borwein_short": ("#e69f00", "-"),
    "anderson": ("#009e73", "-"),
    "lbfgs": ("#222222", "-"),
    "adam": ("#cc79a7", "-"),
    "gauss_newton_4": ("#d55e00", (0, (4, 2))),
    "gauss_newton_16": ("#d55e00", "-"),
}
"""One colour for one family, dashes for its variants (a palette that colour-blind readers can tell apart)."""

TITLES = {
    "logistic": "logistic, λ = 0.1, float64",
    "ridge": "ridge, condition 10⁴, float64",
    "sinusoid_tanh": "sinusoid, tanh MLP, float32",
    "sinusoid_relu": "sinusoid, ReLU MLP, float32",
    "mnist1d": "MNIST-1D, ReLU CNN, float32",
}


def courses(metrics: Mapping[str, Any]) -> Figure:
    """Residuals against gradients, a panel a problem, and the legend in the last place."""
    with mpl.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
        }
    ):
        rows = (len(metrics) + 3) // 3
        made = Figure(figsize=(10.5, 3.2 * rows), layout="constrained")
        axes = made.subplots(rows, 3, squeeze=False).flatten()
    for axis, (problem, found) in zip(axes, metrics.items(), strict=False):
        for solver, run in found.items():
            colour, dashes = STYLES[solver]
            front = solver == "nesterov"
            axis.plot(
                run["gradients"],
                run["median"],
                color=colour,
                linestyle=dashes,
                linewidth=2.0 if front else 1.3,
                marker="o" if front else None,
                markersize=3,
                zorder=3 if front else 2,
                label=LABELS[solver],
            )
        axis.set(yscale="log", ylim=(max(0.5 * lowest(found), 1e-16), 1.3), xlabel="gradients per task")
        axis.set_title(TITLES[problem], fontsize=9.5)
    for axis in axes[len(metrics) :]:
        axis.set_axis_off()
    for axis in axes[: len(metrics) : 3]:
        axis.set_ylabel("relative inner residual, median")
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[-1].legend(handles.values(), handles.keys(), loc="center", frameon=False, fontsize=9)
    return made


def lowest(found: Mapping[str, Any]) -> float:
    """The smallest median of a panel."""
    return min(float(min(run["median"])) for run in found.values())
