"""Figures of the study of meta-optimizers."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metanudge.experiments.study import COLOURS, LABELS, figure
from metanudge.experiments.synthetic.meta_optimizers_races import MetaOptimizersSettings, Race


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
