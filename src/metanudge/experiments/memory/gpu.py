"""Peak memory and time of one meta-gradient on a GPU, whose own counter tells the peak: no processes are needed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from metanudge.errors import SettingsError
from metanudge.experiments.memory.candidates import CANDIDATES
from metanudge.experiments.memory.measuring import Job, Measuring, timed

GPU = "cuda"


class Measured(NamedTuple):
    """One job, where it fits into the GPU.

    Attributes:
        peak_bytes: Allocated at the peak, above what was before: the model, the data, and what a first estimate of one
            step left.
        parameter_bytes: One copy of the adapted parameters.
        seconds: Of one meta-gradient; median.
        seconds_over_loop: As in ``Seconds``.
        gradients: How many it evaluates.
    """

    peak_bytes: int
    parameter_bytes: int
    seconds: float
    seconds_over_loop: float
    gradients: int


def check_gpu() -> None:
    """Raise a SettingsError where there is none."""
    if not torch.cuda.is_available():
        raise SettingsError(
            "the studies whose names end in _gpu need a GPU, and torch sees none here; leave them out, or install a "
            "torch for the GPU that there is (https://pytorch.org/get-started/locally)"
        )


def measure_on_gpu(jobs: Sequence[Job], how: Measuring, advance: Callable[[float], None]) -> dict[str, Any]:
    """``{quantity: {candidate: {x: number}}}``; of what does not fit, ``out_of_memory``, the bytes that there are."""
    metrics: dict[str, Any] = {}
    for done, job in enumerate(jobs, 1):
        found = _measured(job, how)
        whole = torch.cuda.get_device_properties(GPU).total_memory
        numbers = {"out_of_memory": whole} if found is None else found._asdict()
        for quantity, number in numbers.items():
            metrics.setdefault(quantity, {}).setdefault(job.candidate, {})[job.x] = number
        advance(done / len(jobs))
    return metrics


def _measured(job: Job, how: Measuring) -> Measured | None:
    gc.collect()
    torch.cuda.empty_cache()
    try:
        inner = job.make().to(GPU)
        CANDIDATES[job.candidate].prepare(inner, 1)()  # the libraries set themselves up
        inner.model.zero_grad()
        act = CANDIDATES[job.candidate].prepare(inner, job.steps)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        peak = torch.cuda.max_memory_allocated() - before
        return Measured(peak, inner.parameter_bytes, *timed(inner, job, how, _clock))
    except torch.OutOfMemoryError:
        return None


def _clock() -> float:
    """Seconds, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()
