"""The two places where a study of memory can be made, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from metanudge.experiments.memory.candidates import CANDIDATES, ON_A_GPU
from metanudge.experiments.memory.figures import draw
from metanudge.experiments.memory.gpu import GPU, check_gpu, measure_on_gpu
from metanudge.experiments.memory.measuring import Job, Measuring, measure_on_cpu
from metanudge.experiments.study import Claim, Study

Device = Literal["cpu", "cuda"]


def check(device: Device) -> None:
    """Raise a SettingsError where there is none."""
    if device == GPU:
        check_gpu()


def those_of(device: Device, names: Iterable[str]) -> tuple[str, ...]:
    """The candidates that can be measured there."""
    return tuple(name for name in names if device == GPU or name not in ON_A_GPU)


def measure(
    device: Device, jobs: Sequence[Job], how: Measuring, advance: Callable[[float], None], preload: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Memory and time of every job: ``{quantity: {candidate: {x: number}}}``."""
    if device == GPU:
        return measure_on_gpu(jobs, how, advance)
    return measure_on_cpu(jobs, how, advance, preload)


def finished(
    device: Device,
    name: str,
    title: str,
    summary: str,
    claims: list[Claim],
    metrics: dict[str, Any],
    panels: Mapping[str, Mapping[str, float]],
    note: str = "",
) -> Study:
    """The study, which is called ``name_gpu`` where it was made on one.

    Args:
        device: Where.
        name: Of the study and its figure.
        title: Heading.
        summary: Paragraphs.
        claims: What is judged.
        metrics: As ``measure`` returns them.
        panels: As of ``draw``.
        note: Written into the figure.
    """
    beyond = "memory beyond the idle process"
    if device == GPU:
        name, title, beyond = (
            f"{name}_gpu",
            f"{title}, on a GPU",
            "of what is allocated on the GPU beyond the idle state",
        )
        summary = f"{summary}\n\n{_told(metrics)}"
    caption = f"Peak {beyond}, and time, of one meta-gradient, against {' and '.join(panels)}. {_executions(metrics)}"
    return Study(name, title, summary, claims, metrics, {name: (draw(metrics, panels, note), caption)})


def _executions(metrics: Mapping[str, Any]) -> str:
    """How each candidate runs."""
    measured = [candidate for name, candidate in CANDIDATES.items() if name in metrics["seconds"]]
    return "; ".join(
        f"{execution}: {', '.join(found.label for found in measured if found.execution == execution)}"
        for execution in ("In place", "Vectorised")
    )


def _told(metrics: Mapping[str, Any]) -> str:
    """How it was measured on a GPU, and what had no room."""
    said = (
        f"On one {torch.cuda.get_device_name()}, torch {torch.__version__}. Memory is what torch.cuda has allocated at "
        "its peak beyond what it had before (the model, the data, and what a first estimate of one step left behind). "
        "Time is that of the wall, until the GPU has done; with CUDA graphs it includes the first pass, and recording."
    )
    lost = [
        f"{CANDIDATES[name].label} at {', '.join(places)}" for name, places in metrics.get("out_of_memory", {}).items()
    ]
    if not lost:
        return said
    room = next(iter(next(iter(metrics["out_of_memory"].values())).values())) / 2**30
    return f"{said} In its {room:.0f} GiB there was no room for {'; '.join(lost)}."
