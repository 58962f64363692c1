"""Figures of the study of smoothness."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from metanudge.experiments.study import figure
from metanudge.experiments.synthetic.smoothness_measurements import Points, SmoothnessSettings


def scatter(clouds: dict[float, Points], metrics: dict[str, Any]) -> Figure:
    """One panel for each λ, all on the same vertical scale."""
    made, axes = figure(len(clouds), width=1.9, height=2.9)
    dots: dict[str, Any] = {"marker": ".", "ls": "", "ms": 3, "mew": 0, "alpha": 0.5, "rasterized": True}
    for axis, (prox, points) in zip(axes, clouds.items(), strict=True):
        line = metrics[f"{prox:g}"]
        axis.plot(points.gradient, points.exact, color="#0072b2", label="exact ‖Hess F‖", **dots)
        axis.plot(points.gradient, points.midpoint, color="#e69f00", label="midpoint estimate", **dots)
        grid = torch.logspace(float(points.gradient.min().log10()), float(points.gradient.max().log10()), 100)
        axis.plot(grid, line["L0"] + line["L1"] * grid, color="#222222", lw=1.2, label="L0 + L1 ‖∇F‖, fitted to exact")
        axis.set(xscale="log", yscale="log", ylim=(1e-4, 300), xlabel="‖∇F‖")
        axis.set_title(f"λ = {prox:g}", fontsize=10)
        axis.text(0.03, 0.84, f"L1 = {line['L1']:.2g}\nr² = {line['r2']:.2f}", transform=axis.transAxes)
        axis.tick_params(which="minor", bottom=False)
        axis.tick_params(labelleft=axis is axes[0])
    axes[0].set_ylabel("local smoothness of F")
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, markerscale=4)
    return made


def constants(settings: SmoothnessSettings, found: list[dict[str, Any]]) -> Figure:
    """L1 against λ."""
    made, (axis,) = figure()
    axis.plot(settings.prox, [one["L1_bound"] for one in found], color="#7f7f7f", label="bound ρ / λ")
    fitted, draws = [one["L1"] for one in found], [one["L1_of_draws"] for one in found]
    spread = [
        [a - min(b) for a, b in zip(fitted, draws, strict=True)],
        [max(b) - a for a, b in zip(fitted, draws, strict=True)],
    ]
    axis.errorbar(settings.prox, fitted, spread, fmt="o-", ms=4, color="#0072b2", capsize=3, label="fitted to exact")
    midpoint = [one["midpoint"]["L1"] for one in found]
    axis.plot(settings.prox, midpoint, "s--", ms=4, color="#e69f00", label="fitted to midpoint estimates")
    axis.set(xscale="log", yscale="log", xlabel="proximal weight λ", ylabel="L1")
    axis.legend(frameon=False)
    return made
