"""What an experiment is made of, and how its figures look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Advance = Callable[[float], None]
"""Report the share of a study that is done, in [0, 1]."""


class Claim(NamedTuple):
    """One line of the report's table: what the paper says, what was expected, what came out."""

    statement: str
    expected: str
    measured: str
    holds: bool


class Study(NamedTuple):
    """A finished study.

    Attributes:
        name: Key of its metrics and stem of its figures.
        title: Heading in the report.
        summary: A paragraph or two for a person: what was done, what came out, and why where it surprises. Plain text.
        claims: Checked against the metrics.
        metrics: Nested dictionaries of numbers, by the keys users look up.
        figures: By stem, each with a caption.
    """

    name: str
    title: str
    summary: str
    claims: list[Claim]
    metrics: dict[str, Any]
    figures: dict[str, tuple[Figure, str]]


class Entry(NamedTuple):
    """A study to run.

    Attributes:
        settings: A frozen dataclass with a ``seed`` and a classmethod ``quick``.
        run: From settings to the finished study.
        extra: Whether it is run only where it is asked for by name.
    """

    settings: type[Any]
    run: Callable[[Any, Advance], Study]
    extra: bool = False


class Experiment(NamedTuple):
    """What ``metanudge reproduce NAME`` runs.

    Attributes:
        name: Of the command, and of its folder in ``results``.
        title: Heading of the page.
        studies: By name, in order.
    """

    name: str
    title: str
    studies: Mapping[str, Entry]


COLOURS = {
    "fobmaml_symmetric": "#0072b2",
    "fobmaml_forward": "#56b4e9",
    "fobmaml_fourth_order": "#004466",
    "maml": "#222222",
    "imaml": "#009e73",
    "hfmaml": "#8fbc3f",
    "tangent": "#7f7f7f",
    "fomaml": "#d55e00",
    "reptile": "#cc79a7",
    "sgd": "#d55e00",
    "clipped": "#009e73",
    "normalized": "#56b4e9",
    "normalized_momentum": "#0072b2",
}
"""One colour for one method, in every figure (a palette that colour-blind readers can tell apart)."""

LABELS = {
    "fobmaml_symmetric": "FO-B-MAML symmetric",
    "fobmaml_forward": "FO-B-MAML forward",
    "fobmaml_fourth_order": "FO-B-MAML fourth order",
    "maml": "MAML (unrolled)",
    "imaml": "iMAML",
    "hfmaml": "HF-MAML",
    "tangent": "Tangent",
    "fomaml": "FOMAML",
    "reptile": "Reptile",
    "sgd": "SGD",
    "clipped": "clipped SGD",
    "normalized": "normalised SGD",
    "normalized_momentum": "normalised SGD, momentum",
}


def figure(columns: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """Make a row of axes in the house style; no global state is touched."""
    with mpl.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
        }
    ):
        made = Figure(figsize=(width * columns, height), layout="constrained")
        axes = made.subplots(1, columns, squeeze=False)
    return made, list(axes[0])
