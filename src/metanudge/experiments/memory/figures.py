"""Peak memory and time against one quantity, a line an estimator."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from metanudge.experiments.memory.candidates import CANDIDATES
from metanudge.experiments.study import figure

MIB = 2**20


def draw(metrics: Mapping[str, Any], panels: Mapping[str, Mapping[str, float]], note: str = "") -> Figure:
    """Draw a row of panels: memory and time of each.

    Args:
        metrics: As ``measure`` returns them.
        panels: By the label of the x axis: the place of every key x.
        note: Written into the figure.
    """
    made, axes = figure(columns=2 * len(panels), width=4.2, height=4.2)
    for index, (label, places) in enumerate(panels.items()):
        memory, time = axes[2 * index : 2 * index + 2]
        alive = metrics.get("live_bytes", {})  # of a CPU: a GPU's peak is exact
        _lines(memory, alive, places, MIB, ":")
        _lines(memory, metrics["peak_bytes"], places, MIB, "o-")
        _lines(time, metrics["seconds"], places, 1, "o-")
        memory.set_title(f"peak memory, MiB{' (dotted: tensors alone)' if alive else ''}", fontsize=9)
        time.set_title(f"time, {'processor ' if alive else ''}seconds", fontsize=9)
        for axis in (memory, time):
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.set_xticks(list(places.values()), [f"{place:g}" for place in places.values()])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.yaxis.set_major_formatter("{x:g}")
    handles, names = axes[1].get_legend_handles_labels()
    made.legend(handles, names, loc="outside lower center", ncols=5 if len(panels) == 1 else 10, fontsize=8)
    made.suptitle(fill(note, 130), fontsize=8, color="#555555")
    return made


def _lines(
    axis: Axes, table: Mapping[str, Mapping[str, float]], places: Mapping[str, float], unit: float, style: str
) -> None:
    for name, candidate in CANDIDATES.items():
        if name not in table:
            continue
        row = {places[x]: value / unit for x, value in table[name].items() if x in places}
        axis.plot(
            list(row),
            list(row.values()),
            style,
            markersize=3.5,
            color=candidate.colour,
            label=candidate.label,
            zorder=3 if name == "fobmaml" else 2,
        )
