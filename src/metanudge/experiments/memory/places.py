"""The two places where a study of memory can be made, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from metanudge.experiments.memory.candidates import CANDIDATES, EXECUTIONS
from metanudge.experiments.memory.figures import draw
from metanudge.experiments.memory.gpu import GPU, check_gpu, measure_on_gpu
from metanudge.experiments.memory.measuring import Job, Measuring, measure_on_cpu
from metanudge.experiments.study import Claim, Study

Device = Literal["cpu", "cuda"]


def check(device: Device) -> None:
    """Raise a SettingsError where there is none."""
    if device == GPU:
        check_gpu()


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
    caption = f"Peak {beyond}, and time, of one meta-gradient, against {' and '.join(panels)}. {EXECUTIONS}"
    return Study(name, title, summary, claims, metrics, {name: (draw(metrics, panels, note), caption)})


def _told(metrics: Mapping[str, Any]) -> str:
    """How it was measured on a GPU, and what had no room."""
    said = (
        f"On one {torch.cuda.get_device_name()}, torch {torch.__version__}. Memory is what torch.cuda has allocated at "
        "its peak beyond what it had before (the model, the data, and what a first estimate of one step left behind). "
        "Time is that of the wall, until the GPU has done."
    )
    lost = [
        f"{CANDIDATES[name].label} at {', '.join(places)}" for name, places in metrics.get("out_of_memory", {}).items()
    ]
    if not lost:
        return said
    room = next(iter(next(iter(metrics["out_of_memory"].values())).values())) / 2**30
    return f"{said} In its {room:.0f} GiB there was no room for {'; '.join(lost)}."
