"""``metanudge reproduce synthetic``: the paper's synthetic claims as numbers and figures.

Claims (theory: docs/theory.md): (a, i) FO-B-MAML reaches a stationary point of the MAML objective, FOMAML and Reptile
do not: *stationarity*. (f, g, h) The meta-gradient is the derivative of the solution of a perturbed problem, its
finite differences have bias O(delta^(1/2)), O(delta^(2/3)) and so on: *bias*. (b) The objective's smoothness grows with
the meta-gradient: *smoothness*. (c, j) So normalised and clipped steps beat plain ones: *meta_optimizers*, and the
stochastic part of *stationarity*.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from metanudge.experiments import bias, meta_optimizers, smoothness, stationarity
from metanudge.experiments.report import write_report
from metanudge.experiments.study import Advance, Study


class Entry(NamedTuple):
    """A study and its settings: a frozen dataclass with a ``seed`` and a classmethod ``quick``."""

    settings: type[Any]
    run: Callable[[Any, Advance], Study]


STUDIES: Mapping[str, Entry] = {
    "bias": Entry(bias.BiasSettings, bias.run),
    "stationarity": Entry(stationarity.StationaritySettings, stationarity.run),
    "smoothness": Entry(smoothness.SmoothnessSettings, smoothness.run),
    "meta_optimizers": Entry(meta_optimizers.MetaOptimizersSettings, meta_optimizers.run),
}


def reproduce(out: Path, quick: bool, seed: int, only: tuple[str, ...], console: Console) -> list[Study]:
    """Run the studies and write ``metrics.json``, figures and ``report.html``.

    Args:
        out: Folder to write into; made if missing. Nothing is written before every study has ended.
        quick: Use every study's quick form.
        seed: Seed of every study.
        only: Names in ``STUDIES``; empty for all.
        console: Where progress and the table of claims are shown.
    """
    names = only or tuple(STUDIES)
    settings = {}
    for name in names:
        kind = STUDIES[name].settings
        settings[name] = dataclasses.replace(kind.quick() if quick else kind(), seed=seed)
    studies, seconds = [], {}
    torch.set_num_threads(1)  # on operations this small a second thread only waits
    bar = Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        tasks = {name: bar.add_task(name, total=1.0, start=False) for name in names}
        for name in names:
            bar.start_task(tasks[name])
            begun = time.perf_counter()

            def advance(share: float, task: TaskID = tasks[name]) -> None:
                bar.update(task, completed=share)

            studies.append(STUDIES[name].run(settings[name], advance))
            seconds[name] = round(time.perf_counter() - begun, 1)
            bar.update(tasks[name], completed=1.0)
            bar.stop_task(tasks[name])
    options = (" --quick" if quick else "") + (f" --seed {seed}" if seed else "")
    chosen = f" --only {' '.join(only)}" if only else ""
    run = {
        "command": f"metanudge reproduce synthetic{options}{chosen}",
        "seconds": seconds,
        "settings": {name: dataclasses.asdict(value) for name, value in settings.items()},
    }
    write_report(out, "The synthetic study", studies, run)
    console.print(claims_table(studies))
    return studies


def claims_table(studies: list[Study]) -> Table:
    """What was expected and what came out, for the terminal."""
    table = Table(title="Claims", title_justify="left", expand=False)
    for column in ("study", "claim", "expected", "measured", ""):
        table.add_column(column, overflow="fold")
    for study in studies:
        for claim in study.claims:
            mark = "[green]holds[/green]" if claim.holds else "[red]does not hold[/red]"
            table.add_row(study.name, claim.statement, claim.expected, claim.measured, mark)
    return table
