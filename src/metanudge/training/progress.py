"""What is at work, on stderr: a bar for trainings, with the numbers that tell whether they go well, and a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metanudge.training.checkpoint import Run
from metanudge.training.logs import Record
from metanudge.types import Evaluation

PAUSE = 30.0
"""Seconds without a line, away from a terminal, after which there is one."""


class Shown(NamedTuple):
    """What is shown of a training.

    Attributes:
        steps: How many it takes in all.
        every: Steps between lines, where stderr is no terminal.
        metric: Of the validation, in words.
        wanted: Whether anything is.
        lost: Whether an earlier training in the same folder left no checkpoint.
    """

    steps: int
    every: int
    metric: str
    wanted: bool
    lost: bool

    def tell_ended(self, step: int, best_step: int) -> None:
        """Say that the training ended early."""
        if self.wanted:
            text = f"ended at step {step}: no validation was better than that of step {best_step}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)


@contextmanager
def bar(run: Run, shown: Shown) -> Iterator[Callable[[Record, Evaluation | None], None]]:
    """Show steps, time left, loss, residual, dropped tasks and the last validation; yields what tells it of a step.

    On a terminal as a bar, elsewhere as lines: every ``every`` steps, at the end, and about every 30 seconds.
    """
    done, steps = len(run.history), shown.steps
    console = Console(stderr=True)
    live = console.is_terminal or console.is_jupyter
    progress = Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not (shown.wanted and live),
    )
    dropped, last = 0, monotonic()

    def say(text: str) -> None:
        if shown.wanted:
            console.print(text, highlight=False, markup=False, soft_wrap=True)  # which flushes

    def tell(record: Record, found: Evaluation | None) -> None:
        nonlocal dropped, last
        dropped += record.dropped_tasks
        told = f"query loss {record.query_loss:.4g}, residual {record.residual:.2g}, dropped {dropped}"
        if found is not None:
            told += f", validation {shown.metric} {found.mean:.4g} ± {found.ci95:.2g}"
        progress.update(task, completed=record.step, description=told)
        now = monotonic()
        if not live and (record.step % shown.every == 0 or record.step == steps or now - last >= PAUSE):
            say(f"step {record.step}/{steps}: {told}")
            last = now

    with progress:
        if done:
            say(f"going on from step {done}" if done < steps else "was finished before")
        elif shown.lost:
            say(f"no checkpoint yet (one is written every {shown.every} steps): beginning at step 1")
        waiting = "the first step compiles, which can take a minute" if run.learner.compile and done < steps else ""
        if waiting and not live:
            say(waiting)
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
