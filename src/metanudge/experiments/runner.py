"""Run the studies of an experiment, with progress, and write what they found."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from metanudge.errors import SettingsError
from metanudge.experiments.kept import UNFINISHED, Kept, keeping, source_digest
from metanudge.experiments.report import write_report
from metanudge.experiments.study import Experiment, Study
from metanudge.settings import check_folder, check_seed, nearest


def reproduce(
    experiment: Experiment, out: Path, quick: bool, seed: int, only: tuple[str, ...], console: Console
) -> list[Study]:
    """Run the studies and write ``metrics.json``, figures and ``report.html``.

    Stopped, it goes on from the last finished training when called again: the outcomes of trainings are kept in
    ``out/.unfinished``, for the same code and settings alone, until the report is written. Timings are not: they are
    compared within one run.

    Args:
        experiment: What to run.
        out: Folder to write into; made if missing. The report is not written before every study has ended.
        quick: Use every study's quick form.
        seed: Seed of every study.
        only: Names of studies, whose results then replace those in ``out``; empty for all but the extra ones.
        console: Where progress and the claims are shown.

    Raises:
        SettingsError: A name in ``only`` that the experiment does not have, a seed below 0, or a folder that cannot be
            written to; before any work.
    """
    for name in only:
        if name not in experiment.studies:
            raise SettingsError(f"{experiment.name} has no study {name!r}; {nearest(name, experiment.studies)}")
    check_seed(seed)
    check_folder(out)
    names = only or tuple(name for name, entry in experiment.studies.items() if not entry.extra)
    settings = {}
    for name in names:
        kind = experiment.studies[name].settings
        settings[name] = dataclasses.replace(kind.quick() if quick else kind(), seed=seed)
    studies: list[Study] = []
    records: dict[str, dict[str, Any]] = {}
    torch.set_num_threads(1)  # on operations this small a second thread only waits
    bar = Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
    )
    kept = Kept(out / UNFINISHED, source_digest(), lambda text: console.print(text, highlight=False))
    with bar, keeping(kept):
        tasks = {name: bar.add_task(name, total=1.0, start=False) for name in names}
        for name in names:
            bar.start_task(tasks[name])
            begun, taken = time.perf_counter(), kept.taken

            def advance(share: float, task: TaskID = tasks[name]) -> None:
                bar.update(task, completed=share)

            studies.append(experiment.studies[name].run(settings[name], advance))
            records[name] = {"seconds": round(time.perf_counter() - begun, 1)}
            if kept.taken > taken:
                records[name]["finished_before"] = kept.taken - taken  # trainings that the seconds leave out
            bar.update(tasks[name], completed=1.0)
            bar.stop_task(tasks[name])
    options = (" --quick" if quick else "") + (f" --seed {seed}" if seed else "")
    chosen = f" --only {' '.join(only)}" if only else ""
    command = f"metanudge reproduce {experiment.name}{options}{chosen}"
    source = kept.source[:12] + ("" if source_digest() == kept.source else ", changed while it ran")
    run = {
        name: {"command": command, "source": source, **records[name], "settings": dataclasses.asdict(settings[name])}
        for name in names
    }
    write_report(out, experiment.title, studies, run, tuple(experiment.studies))
    kept.remove()
    show_claims(studies, console)
    return studies


def show_claims(studies: list[Study], console: Console) -> None:
    """What was expected and what came out: three lines a claim, which read at any width."""

    def line(indent: int, text: str) -> None:
        console.print(Padding(Text.from_markup(text), (0, 0, 0, indent)))

    for study in studies:
        line(0, f"\n[bold]{study.title}[/bold]")
        for claim in study.claims:
            mark = "[green]holds[/green]" if claim.holds else "[red]does not hold[/red]"
            line(2, f"{mark}: {escape(claim.statement)}")
            line(4, f"[dim]expected {escape(claim.expected)}[/dim]")
            line(4, f"measured {escape(claim.measured)}")
