"""Jobs in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

from metanudge.experiments.study import Advance

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def run_all(
    function: Callable[[Job], Outcome],
    jobs: Sequence[Job],
    workers: int,
    advance: Advance,
    share: Callable[[int], float],
) -> list[Outcome]:
    """Run every job; each must be deterministic, so that how many run at a time makes no difference.

    Args:
        function: A module's function, for it is pickled.
        jobs: What to run.
        workers: Processes at a time; 1 for none but this one.
        advance: Told of progress.
        share: From the number of jobs done to the share of the study.
    """
    if workers == 1:
        found = []
        for done, job in enumerate(jobs):
            found.append(function(job))
            advance(share(done + 1))
        return found
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        for done, _ in enumerate(as_completed(futures)):
            advance(share(done + 1))
        return [future.result() for future in futures]
