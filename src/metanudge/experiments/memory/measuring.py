"""Peak memory and time of one meta-gradient, each measured in a process that has done nothing else."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from torch.utils._pytree import tree_leaves

from metanudge.diagnostics.memory import LiveBytes
from metanudge.errors import MetanudgeError
from metanudge.experiments.memory.candidates import CANDIDATES, Act, Inner, forward_backward
from metanudge.experiments.memory.processes import KEEPING, RETURNING, forked, nursery


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        candidate: Key of ``CANDIDATES``.
        x: Where in the figure.
        make: The inner problem; a function of a module, with its arguments bound.
        steps: Inner steps.
    """

    candidate: str
    x: str
    make: Callable[[], Inner]
    steps: int

    def __str__(self) -> str:
        """For errors."""
        return f"{self.candidate} at {self.x} with {self.steps} inner steps"


@dataclass(frozen=True)
class Measuring:
    """How to measure.

    Attributes:
        workers: Memory is measured in as many processes at once; time always in one.
        repeats: Of a timing, at most.
        budget: Seconds after which a timing is not repeated.
        judged_budget: The same for FO-B-MAML, whose time is judged.
    """

    workers: int = 2
    repeats: int = 7
    budget: float = 2.0
    judged_budget: float = 20.0


QUICK = Measuring(repeats=3, budget=0.5, judged_budget=4.0)
BRIEF = Measuring(repeats=15, budget=0.5, judged_budget=8.0)
"""On a GPU, which takes less time for each."""


class Resident(NamedTuple):
    """Peaks above what was held before, in bytes.

    Attributes:
        baseline: What the process held before: imports, model, data, and what a first estimate of one step left.
        peak: Of the process's resident memory, above that.
    """

    baseline: int
    peak: int


class Seconds(NamedTuple):
    """Time, by one clock.

    Attributes:
        estimate: Of one meta-gradient; median.
        over_loop: Over that of as many gradients of the same model in an ordinary loop; each meta-gradient is divided
            by a loop that ran right after it; median of the ratios.
        gradients: How many it evaluates.
    """

    estimate: float
    over_loop: float
    gradients: int


def resident(job: Job) -> Resident:
    """Peak resident memory of one meta-gradient; for a process of its own."""
    inner = job.make()
    CANDIDATES[job.candidate].prepare(inner, 1)()  # the libraries set themselves up
    inner.model.zero_grad()
    return Resident(*resident_peak(CANDIDATES[job.candidate].prepare(inner, job.steps)))


def live(job: Job) -> tuple[int, int]:
    """Peak of the tensor bytes alive in one meta-gradient, and those of one copy of the adapted parameters."""
    inner = job.make()
    act = CANDIDATES[job.candidate].prepare(inner, job.steps)
    with LiveBytes() as alive:
        held = [*inner.model.parameters(), *inner.model.buffers(), *tree_leaves(inner.tasks)]
        alive.alive |= {leaf.untyped_storage()._cdata for leaf in held}  # a view of them is nothing new
        act()
    return alive.peak, inner.parameter_bytes


def resident_peak(act: Callable[[], object]) -> tuple[int, int]:
    """What the process holds before ``act``, and how far its peak is above that, in bytes. Linux."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _held("VmRSS")
    act()
    return before, _held("VmHWM") - before


def _held(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise MetanudgeError(f"this system does not tell {field} in /proc/self/status; peak memory is read there")
    return 1024 * int(found[1])


def seconds(job: Job, how: Measuring) -> Seconds:
    """Processor time of one meta-gradient on one thread; for a process of its own."""
    inner = job.make()
    CANDIDATES[job.candidate].prepare(inner, 1)()
    return timed(inner, job, how, time.process_time)


def timed(inner: Inner, job: Job, how: Measuring, clock: Callable[[], float]) -> Seconds:
    """Time one meta-gradient and the ordinary loop in turns."""
    act = CANDIDATES[job.candidate].prepare(inner, job.steps)
    estimates: list[float] = []
    ratios: list[float] = []
    gradients, begun = 0, time.perf_counter()
    budget = how.judged_budget if job.candidate == "fobmaml" else how.budget
    while not estimates or (len(estimates) < how.repeats and time.perf_counter() - begun < budget):
        took, gradients = _took(act, clock)
        loop = min(gradients, 100)
        ordinary, _ = _took(partial(_loop, inner, loop), clock)
        estimates.append(took)
        ratios.append(took / gradients / (ordinary / loop))
    return Seconds(median(estimates), median(ratios), gradients)


def _loop(inner: Inner, gradients: int) -> int:
    for _ in range(gradients):
        forward_backward(inner)
    return gradients


def _took(act: Act, clock: Callable[[], float]) -> tuple[float, int]:
    begun = clock()
    gradients = act()
    return clock() - begun, gradients


def measure_on_cpu(
    jobs: Sequence[Job], how: Measuring, advance: Callable[[float], None], preload: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Resident memory, tensor bytes and time of every job: ``{quantity: {candidate: {x: number}}}``.

    Args:
        jobs: What to measure.
        how: Settings.
        advance: Told the share that is done.
        preload: Modules that a nurse imports for all.
    """
    metrics: dict[str, Any] = {}
    passes = (
        Pass(resident, RETURNING, ("baseline_bytes", "peak_bytes"), False),
        Pass(live, KEEPING, ("live_bytes", "parameter_bytes"), False),
        Pass(partial(seconds, how=how), KEEPING, ("seconds", "seconds_over_loop", "gradients"), True),
    )
    with nursery(how.workers, preload) as nurses:
        for place, part in enumerate(passes):
            for done, (job, numbers) in enumerate(zip(jobs, part.over(nurses, jobs), strict=True), 1):
                for quantity, number in zip(part.quantities, numbers, strict=True):
                    metrics.setdefault(quantity, {}).setdefault(job.candidate, {})[job.x] = number
                advance((place + done / len(jobs)) / len(passes))
    return metrics


class Pass(NamedTuple):
    """One measurement of every job.

    Attributes:
        function: From a job to numbers.
        allocator: Parameters of the C library's.
        quantities: Names of the numbers.
        alone: One job at a time, as other processes would disturb it.
    """

    function: Callable[[Job], tuple[Any, ...]]
    allocator: Mapping[int, int]
    quantities: tuple[str, ...]
    alone: bool

    def over(self, nurses: Executor, jobs: Sequence[Job]) -> Iterator[tuple[Any, ...]]:
        """What it finds, in order."""
        measure_one = partial(forked, self.function, self.allocator)
        if self.alone:
            return (nurses.submit(measure_one, job).result() for job in jobs)
        return nurses.map(measure_one, jobs)
