"""A bar with the numbers that tell whether a training goes well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metanudge.logs import Record
from metanudge.types import Evaluation


@contextmanager
def bar(steps: int, done: int, metric: str, shown: bool) -> Iterator[Callable[[Record, Evaluation | None], None]]:
    """Show steps, time left, loss, residual, dropped tasks and the last validation; yields what tells it of a step."""
    progress = Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not shown,
    )
    dropped = 0

    def tell(record: Record, found: Evaluation | None) -> None:
        nonlocal dropped
        dropped += record.dropped_tasks
        told = f"query loss {record.query_loss:.4g}, residual {record.residual:.2g}, dropped {dropped}"
        if found is not None:
            told += f", validation {metric} {found.mean:.4g} ± {found.ci95:.2g}"
        progress.update(task, completed=record.step, description=told)

    with progress:
        task = progress.add_task("", total=steps, completed=done)
        yield tell
