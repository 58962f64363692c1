"""What is at work, on stderr: a bar for trainings, with the numbers that tell whether they go well, and a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metanudge.checkpoint import Run
from metanudge.logs import Record
from metanudge.types import Evaluation


@contextmanager
def bar(run: Run, steps: int, metric: str, shown: bool) -> Iterator[Callable[[Record, Evaluation | None], None]]:
    """Show steps, time left, loss, residual, dropped tasks and the last validation; yields what tells it of a step."""
    done = len(run.history)
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
        if done and shown:
            left = f"going on from step {done}" if done < steps else "was finished before; resume=False begins anew"
            progress.console.print(left, highlight=False)
        waiting = "the first step compiles, which can take a minute" if run.learner.compile and done < steps else ""
        task = progress.add_task(waiting, total=steps, completed=done)
        yield tell


@contextmanager
def line(what: str) -> Iterator[Callable[[str], None]]:
    """Show what is at work: on a terminal a line that changes, elsewhere one more each time; yields what tells it."""
    console = Console(stderr=True)
    with console.status(what) as status:

        def tell(now: str) -> None:
            shown = escape(f"{what}: {now}")
            if console.is_terminal:
                status.update(shown)
            else:
                console.print(shown, highlight=False, soft_wrap=True)

        yield tell
