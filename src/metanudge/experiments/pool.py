"""Jobs in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Thread, current_thread, main_thread
from typing import TypeVar

from metanudge.experiments.kept import KEPT
from metanudge.experiments.study import Advance

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def run_all(
    function: Callable[[Job], Outcome],
    jobs: Sequence[Job],
    workers: int,
    advance: Advance,
    share: Callable[[int], float],
    called: str = "trainings",
) -> list[Outcome]:
    """Run every job; each must be deterministic, so that how many run at a time makes no difference.

    Inside ``keeping`` a job whose outcome is kept is not run again, and every other outcome is kept as soon as it is
    there. The first job that fails ends the others.

    Args:
        function: A module's function, for it is pickled.
        jobs: What to run.
        workers: Processes at a time; 1 for none but this one.
        advance: Told of progress.
        share: From the number of jobs done to the share of the study.
        called: What the jobs are, for a person.
    """
    kept = KEPT.get()
    outcomes = {} if kept is None else kept.find(function, jobs, called)
    if outcomes:
        advance(share(len(outcomes)))
    left = {place: job for place, job in enumerate(jobs) if place not in outcomes}
    with closing(_run(function, left, workers)) as running:
        for place, outcome in running:
            if kept is not None:
                kept.keep(function, jobs[place], outcome)
            outcomes[place] = outcome
            advance(share(len(outcomes)))
    return [outcomes[place] for place in range(len(jobs))]


def _run(
    function: Callable[[Job], Outcome], jobs: Mapping[int, Job], workers: int
) -> Generator[tuple[int, Outcome], None, None]:
    """Outcomes as they come, each with the key of its job."""
    if workers == 1 or not jobs:
        for place, job in jobs.items():
            yield place, function(job)
        return
    spawn = get_context("spawn")
    theirs, ours = spawn.Pipe(duplex=False)
    with theirs, ours, ProcessPoolExecutor(workers, spawn, _end_with, (theirs,)) as pool:
        try:
            with _interrupts_ignored():  # by the workers from their birth on, which inherit it
                futures = {pool.submit(function, job): place for place, job in jobs.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            ours.close()  # the pool would first run every job that waits
            raise


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if current_thread() is not main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with(parent: Connection) -> None:
    """What a worker does first: from now on it ends when the other end of the pipe closes, whatever it is doing.

    The operating system closes it when the parent is killed, by any signal; a worker left alone would wait for jobs
    for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too, but it is the parent that tells

    def watch() -> None:
        parent.poll(None)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
